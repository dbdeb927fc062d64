"""The manifests against the operators' own models, which come with Kubeflow's Python package.

That package knows TrainJob, TrainingRuntime, JobSet and every pod field; of the older PyTorchJob, the frame around its
pods is checked by hand.
"""

from pathlib import Path

import pytest
import yaml

from fastvit_engine.config import recipe_names

LAUNCH = Path(__file__).parents[2] / "launch"
KUBERNETES = LAUNCH / "kubernetes"


@pytest.fixture(scope="module")
def models():
    return pytest.importorskip("kubeflow_trainer_api.models", reason="needs pip install kubeflow-trainer-api")


def documents(name):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def assert_valid(model, document):
    """Right types, nothing missing, and no field that the model does not know: it would be gone on the way back."""
    assert model.from_dict(document).to_dict() == document


def pods():
    replicas = documents("train.yaml")[0]["spec"]["pytorchReplicaSpecs"]
    runtime = documents("trainjob.yaml")[0]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    return {
        "Master": replicas["Master"]["template"],
        "Worker": replicas["Worker"]["template"],
        "v2": runtime["template"],
    }


def test_the_check_finds_a_typing_error(models):
    pod = pods()["v2"]
    pod["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(AssertionError):
        assert_valid(models.IoK8sApiCoreV1PodTemplateSpec, pod)


def test_the_train_job_and_its_runtime_are_valid(models):
    runtime, job = documents("trainjob.yaml")
    assert_valid(models.TrainerV1alpha1TrainingRuntime, runtime)
    assert_valid(models.TrainerV1alpha1TrainJob, job)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]


def test_the_pytorch_job_is_valid(models):
    (job,) = documents("train.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"].keys() <= {"runPolicy", "pytorchReplicaSpecs", "elasticPolicy", "nprocPerNode"}
    run_policy = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
    assert job["spec"]["runPolicy"].keys() <= run_policy | {"schedulingPolicy", "suspend"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    for replica in replicas.values():
        assert replica.keys() == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] == "ExitCode"
        assert_valid(models.IoK8sApiCoreV1PodTemplateSpec, replica["template"])
        assert replica["template"]["spec"]["containers"][0]["name"] == "pytorch"
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        arguments = replica["template"]["spec"]["containers"][0]["args"]
        assert arguments[arguments.index("--nodes") + 1] == str(nodes)


@pytest.mark.parametrize("name", ["Master", "Worker", "v2"])
def test_a_pod_has_memory_for_batches_and_time_for_a_checkpoint(name):
    pod = pods()[name]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == {"/dev/shm", "/shards", "/runs"}
    assert set(mounts.values()) == volumes.keys()
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    arguments = container.get("args") or documents("trainjob.yaml")[1]["spec"]["trainer"]["args"]
    assert pod["terminationGracePeriodSeconds"] > int(arguments[arguments.index("--grace") + 1])
    assert arguments[arguments.index("--") + 1] in recipe_names()
    assert any(variable["name"] == "POD_IP" for variable in container["env"])
