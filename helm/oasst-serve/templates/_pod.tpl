{{/* What pods have in common. */}}

{{- define "oasst.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "oasst.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What every pod runs as, and where it may: `placement` is the values that say so. */}}
{{- define "oasst.podBase" -}}
serviceAccountName: {{ include "oasst.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "oasst.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .placement.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .placement.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .placement.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .placement.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Gateways and workers, of which there are several. */}}
{{- define "oasst.podSettings" -}}
{{ include "oasst.podBase" (dict "root" .root "placement" (index .root.Values .component)) }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "oasst.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{/* How many pods. Of what an autoscaler owns as many as there are: without a number, an upgrade that begins to scale a
release, and so takes its number away, leaves one pod of it. At least one: an autoscaler leaves none as they are. */}}
{{- define "oasst.replicas" -}}
{{- if .isScaled -}}
{{- with lookup "apps/v1" .kind .root.Release.Namespace (include "oasst.name" .) -}}
replicas: {{ max 1 .spec.replicas }}
{{- end -}}
{{- else -}}
replicas: {{ (index .root.Values .component).replicas }}
{{- end -}}
{{- end }}

{{- define "oasst.traces.env" -}}
{{- with .root.Values.traces.endpoint }}
- name: OASST_{{ upper $.component }}_OTLP_ENDPOINT
  value: {{ . }}
{{- end }}
{{- end }}

{{/* Options as environment variables: `max-open-chats: 9` becomes OASST_GATEWAY_MAX_OPEN_CHATS. */}}
{{- define "oasst.options" -}}
{{- $prefix := printf "OASST_%s_" (upper .component) -}}
{{- range $option, $value := (index .root.Values .component).options }}
- name: {{ printf "%s%s" $prefix ($option | replace "-" "_" | upper) }}
  {{- /* Numbers from YAML are floats: 4194304 must not become 4.194304e+06. */}}
  value: {{ ternary ($value | toJson) ($value | toString) (kindIs "float64" $value) | quote }}
{{- end }}
{{- end }}

{{/* A `text` as a block of YAML, so many spaces in; empty lines stay empty. */}}
{{- define "oasst.block" -}}
{{- regexReplaceAll "(?m)^ +$" (.text | trim | nindent .indent) "" -}}
{{- end }}
