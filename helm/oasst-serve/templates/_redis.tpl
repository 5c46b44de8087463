{{/* How gateway and worker reach the queue. */}}

{{- define "oasst.redis.secret" -}}
{{- .Values.redis.builtIn.existingSecret | default (include "oasst.name" (dict "root" . "component" "valkey")) -}}
{{- end }}

{{/* The URL of the component's own user (gateway, worker or admin), never in clear where it holds a password. */}}
{{- define "oasst.redis.env" -}}
{{- $variable := eq .component "admin" | ternary "OASST_REDIS_URL" (printf "OASST_%s_REDIS_URL" (upper .component)) -}}
{{- with .root.Values.redis -}}
{{- if .builtIn.enabled -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "oasst.redis.secret" $.root }}, key: {{ $.component }}-password}
- name: {{ $variable }}
  value: redis://oasst-{{ $.component }}:$(REDIS_PASSWORD)@{{ include "oasst.name" (dict "root" $.root "component" "valkey") }}:6379/0
{{- else if .external.existingSecret -}}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef: {name: {{ .external.existingSecret }}, key: {{ $.component }}-url}
{{- else -}}
- name: {{ $variable }}
  value: {{ .external.url | quote }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "oasst.redis.volumeMount" -}}
{{- if .Values.redis.external.caSecret -}}
- {name: redis-ca, mountPath: /etc/oasst/redis, readOnly: true}
{{- end }}
{{- end }}

{{- define "oasst.redis.volume" -}}
{{- with .Values.redis.external.caSecret -}}
- name: redis-ca
  secret:
    secretName: {{ . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}
