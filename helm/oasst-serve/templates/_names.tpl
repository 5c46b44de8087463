{{/* Names and labels. Most templates get (dict "root" $ "component" "gateway"); what is no component's has none. */}}

{{- define "oasst.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* Room for "-headless", "-worker" and a StatefulSet's ordinals in 63 characters. */ -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "oasst.name" -}}
{{- list (include "oasst.fullname" .root) .component | compact | join "-" -}}
{{- end }}

{{- define "oasst.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* Of pods: nothing that another release of the chart changes, which would start them all again. */}}
{{- define "oasst.podLabels" -}}
{{ include "oasst.selector" . }}
app.kubernetes.io/part-of: oasst-serve
{{- end }}

{{- define "oasst.labels" -}}
{{ include "oasst.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "oasst.metadata" -}}
name: {{ include "oasst.name" . }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "oasst.labels" . | nindent 2 }}
{{- end }}

{{/* @DIGEST where there is one, else :TAG. */}}
{{- define "oasst.image.version" -}}
{{- $image := (index .root.Values .component).image -}}
{{- if $image.digest -}}
@{{ $image.digest }}
{{- else -}}
:{{ coalesce $image.tag .root.Values.image.tag .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "oasst.image" -}}
{{- $image := (index .root.Values .component).image -}}
{{- list .root.Values.image.registry $image.repository | compact | join "/" }}{{ include "oasst.image.version" . -}}
{{- end }}
