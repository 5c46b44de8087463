{{/* Where the model is, and how it comes there. */}}

{{- define "oasst.model.path" -}}
{{- ternary "/models/current" .Values.model.path (ne .Values.model.hub.id "") -}}
{{- end }}

{{- define "oasst.model.name" -}}
{{- .Values.model.name | default .Values.model.hub.id | default (base .Values.model.path) -}}
{{- end }}

{{- define "oasst.model.isMounted" -}}
{{- if or .Values.model.hub.id .Values.model.volume.existingClaim }}true{{ end -}}
{{- end }}

{{/* Fetches and checks `files` (file -> SHA-256) before the pod's own container starts. */}}
{{- define "oasst.model.initContainer" -}}
{{- if .root.Values.model.hub.id -}}
- name: fetch-model
  image: {{ include "oasst.image" . }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [python, /etc/oasst/fetch/fetch_model.py]
  args:
    - --repository={{ .root.Values.model.hub.id }}
    - --revision={{ .root.Values.model.hub.revision }}
    - --folder=/models/current
    {{- range $file, $sha256 := .files }}
    - --file={{ $file }}={{ $sha256 }}
    {{- end }}
  env:
    - name: HF_HOME
      value: /tmp/huggingface
    {{- with .root.Values.model.hub.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . | quote }}
    {{- end }}
    {{- with .root.Values.model.hub.tokenSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ . }}, key: token}
    {{- end }}
  securityContext:
    {{- include "oasst.containerSecurity" .root | nindent 4 }}
  resources:
    requests: {cpu: 250m, memory: 256Mi}
    limits: {memory: 2Gi}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    - {name: fetch, mountPath: /etc/oasst/fetch, readOnly: true}
{{- end }}
{{- end }}
