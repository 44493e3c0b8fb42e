"""What KubeRay's custom resources may hold, written by hand after its API reference (ray.io/v1, KubeRay 1.5.1).

It is not the published schema, which no package ships: it lists the fields that exist and their types, refuses every
other, and refers to Kubernetes' own schema for pod templates. What the operator does not check either (nonsense inside
`rayStartParams`) is not checked here.
"""

from typing import Any

Schema = dict[str, Any]

_TEMPLATE = {"$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.PodTemplateSpec"}
_SERVICE = {"$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.Service"}
_RESOURCES = {"$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.ResourceRequirements"}
_SOURCE = {"$ref": "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.EnvVarSource"}
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_CREDENTIAL = _object(value=_TEXT, valueFrom=_SOURCE)
_AUTOSCALER = _object(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=_COUNT,
    image=_TEXT,
    resources=_RESOURCES,
    env={"type": "array"},
    envFrom={"type": "array"},
)
_HEAD = _object(
    ("template",),
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
    serviceType=_TEXT,
    headService=_SERVICE,
    enableIngress=_FLAG,
    resources=_TEXTS,
    labels=_TEXTS,
)
_WORKERS = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    idleTimeoutSeconds=_COUNT,
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
    resources=_TEXTS,
    labels=_TEXTS,
)
_CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    gcsFaultToleranceOptions=_object(
        redisAddress=_TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_TEXT,
    ),
    authOptions=_object(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=_FLAG,
    autoscalerOptions=_AUTOSCALER,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
    headServiceAnnotations=_TEXTS,
    suspend=_FLAG,
)
_JOB = _object(
    ("entrypoint",),
    entrypoint=_TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    runtimeEnvYAML=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    clusterSelector=_TEXTS,
    rayClusterSpec=_CLUSTER,
    submitterPodTemplate=_TEMPLATE,
    metadata=_TEXTS,
    jobId=_TEXT,
    backoffLimit=_COUNT,
    activeDeadlineSeconds=_COUNT,
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
    suspend=_FLAG,
)
_SERVED = _object(
    ("serveConfigV2", "rayClusterConfig"),
    serveConfigV2=_TEXT,
    rayClusterConfig=_CLUSTER,
    serveService=_SERVICE,
    upgradeStrategy=_object(type=_TEXT),
    excludeHeadPodFromServeSvc=_FLAG,
)


def schema_of(kind: str) -> Schema:
    """The JSON schema of a RayCluster, RayJob or RayService; it refers to Kubernetes' definitions."""
    spec = {"RayCluster": _CLUSTER, "RayJob": _JOB, "RayService": _SERVED}[kind]
    metadata = _object(name=_TEXT, generateName=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )
