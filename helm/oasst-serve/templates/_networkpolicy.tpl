{{/* Rules that several NetworkPolicies share. */}}

{{- define "oasst.peers" -}}
{{- if . -}}
{{- toYaml . -}}
{{- else -}}
- podSelector: {}
{{- end -}}
{{- end }}

{{- define "oasst.egress.dns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{- define "oasst.egress.redis" -}}
{{- if .Values.redis.builtIn.enabled -}}
- to:
    - podSelector:
        matchLabels:
          {{- include "oasst.selector" (dict "root" . "component" "valkey") | nindent 10 }}
  ports:
    - {port: 6379, protocol: TCP}
{{- else -}}
- ports:
    {{- range .Values.redis.external.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}
{{- end }}

{{- define "oasst.egress.hub" -}}
{{- if .Values.model.hub.id -}}
{{- $url := urlParse (default "https://" .Values.model.hub.endpoint) -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "80" "443" (eq $url.scheme "http")) -}}
- ports:
    - {port: {{ $port }}, protocol: TCP}
  {{- with .Values.networkPolicy.hub }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "oasst.egress.traces" -}}
{{- with .Values.traces.endpoint -}}
- ports:
    - {port: {{ regexFind "[0-9]+$" . }}, protocol: TCP}
  {{- with $.Values.networkPolicy.traces }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "oasst.ingress.metrics" -}}
- from:
    {{- include "oasst.peers" .Values.networkPolicy.prometheus | nindent 4 }}
  ports:
    - {port: metrics, protocol: TCP}
{{- end }}
