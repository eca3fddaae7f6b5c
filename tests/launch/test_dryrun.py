"""What Slurm and Kubernetes would be asked for, compared with what is meant."""

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator

from tests.launch.parsed import dryrun, slurm_script, torchrun
from torchrec_compress.launch.components import dlrm

TRAINING = ["configs/demo.yaml", "--seed", "3"]
# What the CRD of a Volcano job allows, for the fields that TorchX writes. Source: volcano-sh/volcano,
# config/crd/volcano/bases/batch.volcano.sh_jobs.yaml; pod templates are checked by Kubernetes' own schema.
_NAME = {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
_COUNT = {"type": "integer", "minimum": 0}
_EVENTS = ["*", "PodPending", "PodRunning", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "OutOfSync"]
_EVENTS += ["CommandIssued", "JobUpdated", "TaskFailed"]
_POLICY = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"action": {"type": "string"}, "event": {"enum": _EVENTS}, "events": {"items": {"enum": _EVENTS}}},
}
_TASK = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": _NAME,
        "replicas": _COUNT,
        "minAvailable": _COUNT,
        "maxRetry": _COUNT,
        "policies": {"type": "array", "items": _POLICY},
        "template": {"type": "object", "required": ["metadata", "spec"]},
    },
}
_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "schedulerName": {"const": "volcano"},
        "queue": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "maxRetry": _COUNT,
        "minAvailable": _COUNT,
        "priorityClassName": {"type": "string"},
        "plugins": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        "tasks": {"type": "array", "minItems": 1, "items": _TASK},
    },
}
VOLCANO_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "batch.volcano.sh/v1alpha1"},
        "kind": {"const": "Job"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": _NAME}},
        "spec": _SPEC,
    },
}


def manifest(app, **cfg):
    from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

    return sanitize_for_serialization(dryrun(app, "kubernetes", **cfg).request.resource)


def check_manifest(job) -> None:
    """Raise where the job is not one that Volcano's and Kubernetes' schemas allow, unknown fields included."""
    Draft202012Validator(VOLCANO_JOB).validate(job)
    for task in job["spec"]["tasks"]:
        metadata = {"name": task["name"], **task["template"]["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": task["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_slurm_gets_one_component_per_node():
    app = dlrm(*TRAINING, j="2x8", cpu=32, memMB=200_000, python="/env/bin/python", rdzv_port=2345, max_restarts=3)
    nodes, _ = slurm_script(dryrun(app, "slurm", partition="long", time="04:00:00"))
    assert len(nodes) == 2
    for number, node in enumerate(nodes):
        assert node.sbatch == {
            "job-name": f"dlrm-{number}",
            "requeue": "",
            "partition": "long",
            "time": "04:00:00",
            "ntasks-per-node": "1",
            "cpus-per-task": "32",
            "mem": "200000",
        }
        assert node.srun["output"] == f"slurm-7-dlrm-{number}.out" and node.srun["kill-on-bad-exit"] == "1"
        assert node.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1" and node.env["OMP_NUM_THREADS"] == "4"
        assert node.env["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] == "[${rank}]:"
        assert node.command.python == ["/env/bin/python"]
        assert node.command.torchrun == {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:2345",
            "rdzv_id": "7",
            "nnodes": "2",
            "nproc_per_node": "8",
            "max_restarts": "3",
            "tee": "3",
            "role": "",
        }
        assert node.command.training == ["torchrec_compress", "train", *TRAINING]


def test_slurm_gets_gpus_in_one_of_its_two_ways():
    app = dlrm(*TRAINING, j="2x8", gpu=8)
    for node in slurm_script(dryrun(app, "slurm"))[0]:
        # per node since Slurm 24.11 (TorchX's nightly asks for the version), per task before
        assert {node.sbatch.get("gpus-per-task"), node.sbatch.get("gpus-per-node")} == {"8", None}


def test_slurm_requeues_as_often_as_retries_are_given():
    script = dryrun(dlrm(*TRAINING, j="2x1", max_retries=2), "slurm").request.materialize()
    assert "export TORCHX_MAX_RETRIES=2" in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


@pytest.mark.filterwarnings("ignore:.*Volcano:UserWarning")
def test_the_kubernetes_manifest_is_valid_and_says_what_is_meant():
    app = dlrm(
        *TRAINING,
        j="1:2x8",
        gpu=8,
        memMB=200_000,
        max_retries=2,
        image="registry/compress:1",
        mounts=["type=volume", "src=claim", "dst=/runs"],
        output="/runs/x",
        env={"A": "1"},
    )
    job = manifest(app, queue="training")
    check_manifest(job)
    assert (job["spec"]["queue"], job["spec"]["maxRetry"]) == ("training", 2)
    assert [(task["name"], task["minAvailable"]) for task in job["spec"]["tasks"]] == [("dlrm-0", 1), ("dlrm-1", 0)]
    hosts = ["TORCHX_RANK0_HOST", "VC_DLRM_0_HOSTS"]
    for task, host in zip(job["spec"]["tasks"], hosts, strict=True):
        assert {"RestartJob"} == {policy["action"] for policy in task["policies"]}
        (container,) = task["template"]["spec"]["containers"]
        assert container["image"] == "registry/compress:1"
        assert container["resources"]["limits"] == {"cpu": "8000m", "memory": "200000M", "nvidia.com/gpu": "8"}
        assert container["ports"] == [{"containerPort": 29500, "name": "c10d"}]
        env = {one["name"]: one["value"] for one in container["env"]}
        assert env["A"] == "1" and env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert ("/runs", "mount-0") in {(one["mountPath"], one["name"]) for one in container["volumeMounts"]}
        command = torchrun(container["command"])
        assert command.torchrun["rdzv_endpoint"] == f"${{{host}:=localhost}}:29500"
        assert command.torchrun["rdzv_id"] == job["metadata"]["name"]
        assert command.training == ["torchrec_compress", "train", *TRAINING, "--output", "/runs/x"]
    claims = [one["persistentVolumeClaim"] for one in task["template"]["spec"]["volumes"] if one["name"] == "mount-0"]
    assert [claim["claimName"] for claim in claims] == ["claim"]


def test_the_checks_of_a_manifest_can_fail():
    job = manifest(dlrm(*TRAINING))
    job["spec"]["tasks"][0]["replica"] = 1
    with pytest.raises(Exception, match="replica"):
        check_manifest(job)
    job = manifest(dlrm(*TRAINING))
    job["spec"]["tasks"][0]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolicies"):
        check_manifest(job)
