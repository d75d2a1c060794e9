"""Kubernetes: manifests against its schemas, and the backend against a stand-in for the API server. Skips without both
kubernetes and kubernetes-validate."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.inputs import ROOT
from support.jobs_served import make_place, serve_jobs, sha256
from support.processes import LONGEST, wait_for

pytest.importorskip("kubernetes")
pytest.importorskip("kubernetes_validate")

import kubernetes_validate
from support.cluster import TOKEN, allowed, check, find, pod_that_ended, pods_of, start_cluster

from common import cli
from common.cli import UserError
from common.jobs import kubernetes_backend
from common.jobs.backend import Device
from common.jobs.kubernetes_backend import KubernetesBackend, device_of, read_template
from common.jobs.local_backend import PAUSE_GRACE
from common.jobs.service import Service
from common.jobs.worker import BUSY, STOPPED

pytestmark = pytest.mark.processes

K8S = ROOT / "k8s"
MANIFESTS = [
    (path.name, body) for path in sorted(K8S.glob("*.yaml")) for body in yaml.safe_load_all(path.read_text()) if body
]
BUILT_IN = [(name, body) for name, body in MANIFESTS if body["kind"] != "TrainJob"]


# The manifests.


@pytest.mark.parametrize(("name", "body"), BUILT_IN, ids=[f"{n}-{b['kind']}" for n, b in BUILT_IN])
def test_manifests_are_valid(name, body):
    check(body)


def set_memory(job: dict) -> None:
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "8Gigs"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda job: job["spec"].update(backofLimit=1), kubernetes_validate.ValidationError),
        (lambda job: job["spec"].update(backoffLimit="one"), kubernetes_validate.ValidationError),
        (lambda job: job["metadata"].update(name="Distill_1"), AssertionError),
        (lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Always"), AssertionError),
        (lambda job: job["spec"]["template"]["spec"]["volumes"].pop(0), AssertionError),
        (set_memory, ValueError),
    ],
)
def test_the_check_finds_what_is_wrong(change, error):
    job = read_template(str(K8S / "distill-job.yaml"))
    change(job)
    with pytest.raises(error):
        check(job)


def test_the_train_job_is_one():
    """By the models of Kubeflow Trainer's own API: nothing in it is unknown there."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    ((_, body),) = ((name, body) for name, body in MANIFESTS if body["kind"] == "TrainJob")
    parsed = models.TrainerV1alpha1TrainJob.from_dict(body)
    assert parsed.to_dict() == body
    trainer = body["spec"]["trainer"]
    assert trainer["numNodes"] > 1
    assert trainer["command"] == ["torchrun", "distill_train.py"]


def test_pods_are_confined():
    """Non-root, read-only root, no capabilities, requests and limits, and a tag that is not `latest`."""
    seen = 0
    for name, body in MANIFESTS:
        for pod in pods_of(body):
            assert pod["securityContext"]["runAsNonRoot"], name
            assert pod["securityContext"]["runAsUser"] >= 10_000
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"]
                assert not security["allowPrivilegeEscalation"]
                assert security["capabilities"] == {"drop": ["ALL"]}
                writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
                assert {"/data", "/tmp"} <= writable
                if "image" in container:  # a TrainJob has its resources elsewhere
                    assert set(container["resources"]) == {"requests", "limits"}
                seen += 1
        for image in find(body, "image"):
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+", image)
        text = json.dumps(body)
        assert not re.search(r"python[^\"]*\", \"-c\"|sh\", \"-c", text)  # no inline programs
    assert seen == 4


def test_one_image_one_claim_one_set_of_settings():
    images = {image for _, body in MANIFESTS for image in find(body, "image")}
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert images == {f"distill-slm:{version}"}
    names = {(body["kind"], body["metadata"]["name"]) for _, body in MANIFESTS}
    for kind, key in (("PersistentVolumeClaim", "claimName"), ("ServiceAccount", "serviceAccountName")):
        used = {name for _, body in MANIFESTS for name in find(body, key)}
        assert used
        assert {(kind, name) for name in used} <= names
    for reference in (r for _, body in MANIFESTS for r in find(body, "configMapRef") + find(body, "configMap")):
        assert ("ConfigMap", reference["name"]) in names


@pytest.mark.parametrize("name", ["api", "serve"])
def test_a_server_is_probed_and_reached_by_its_service(name):
    (deployment,) = (body for file, body in MANIFESTS if file == f"{name}-deployment.yaml")
    (service,) = (body for file, body in MANIFESTS if file == f"{name}-service.yaml")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"] == "http"
    others = [body for file, body in MANIFESTS if body["kind"] == "Deployment" and body is not deployment]
    assert all(not service["spec"]["selector"].items() <= pod_labels(other) for other in others)


def pod_labels(body: dict):
    return body["spec"]["template"]["metadata"]["labels"].items()


def test_the_service_is_asked_for_by_its_name_and_gives_the_jobs_its_image():
    (deployment,) = (body for name, body in MANIFESTS if name == "api-deployment.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "IMAGE", "value": container["image"]} in container["env"]
    (service,) = (body for name, body in MANIFESTS if name == "api-service.yaml")
    assert {"name": "ALLOWED_HOSTS", "value": service["metadata"]["name"]} in container["env"]


def test_the_inference_servers_pod_starts_it_with_its_own_settings(monkeypatch):
    from common.serving.settings import ServerSettings

    (deployment,) = (body for name, body in MANIFESTS if name == "serve-deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["command"], container["args"][0]) == (["python"], "/app/serve_creditmix.py")
    assert container["workingDir"] == "/data"  # from where a base such as models/tiny_student is named
    parsed = cli.parse_args(load_script("serve_creditmix").build_parser(), container["args"][1:])
    assert (parsed.host, parsed.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert pod["automountServiceAccountToken"] is False
    described = (ROOT / "docs" / "serving.md").read_text()
    for entry in container["env"]:
        assert f"`{entry['name']}`" in described or entry["name"] == "HF_TOKEN"
        monkeypatch.setenv(entry["name"], entry.get("value", "secret"))
    settings = ServerSettings.from_environment()
    assert (settings.runs_dir, settings.idp_schema) == ("/data/runs", "/data/idp_schema.json")
    assert settings.preload and settings.api_key == "secret"
    (service,) = (body for name, body in MANIFESTS if name == "serve-service.yaml")
    assert service["metadata"]["name"] in settings.allowed_hosts
    assert pod["terminationGracePeriodSeconds"] > settings.request_timeout


def test_the_settings_are_the_services_and_the_trainers(planner_parser):
    (config,) = (body for _, body in MANIFESTS if body["kind"] == "ConfigMap")
    described = (ROOT / "serve_distill.py").read_text()
    for name in config["data"]:
        assert name in ("job.yaml", "HF_HOME", "GGUF_CACHE") or name in described, name
    job = read_template(str(K8S / "distill-job.yaml"))
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[0] == "distill_train.py"
    at = args.index("--config") + 1
    parsed = planner_parser([*args[1:at], config["data"]["job.yaml"], *args[at + 1 :]])
    assert (parsed.teacher, parsed.student, parsed.max_steps, parsed.lora_r) == ("gpt2", "distilgpt2", 30, 0)
    assert parsed.resume


@pytest.fixture
def planner_parser(tmp_path):
    from common.jobs.request import Planner

    parser = Planner(ROOT, tmp_path, None).parser("distill")

    def parse(argv: list[str]):
        at = argv.index("--config") + 1
        (tmp_path / "job.yaml").write_text(argv[at])
        return cli.parse_args(parser, [*argv[:at], str(tmp_path / "job.yaml"), *argv[at + 1 :]])

    return parse


def test_a_paused_pod_has_the_time_that_a_paused_job_has_elsewhere():
    pod = read_template(str(K8S / "distill-job.yaml"))["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= PAUSE_GRACE


def test_pods_that_go_on_are_those_that_the_worker_means():
    rules = read_template(str(K8S / "distill-job.yaml"))["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore"]
    assert rules[1]["onExitCodes"]["values"] == [BUSY, STOPPED]


def test_network_policies_cover_servers_and_workers():
    policies = {body["metadata"]["name"]: body["spec"] for _, body in MANIFESTS if body["kind"] == "NetworkPolicy"}
    chosen = [policy["podSelector"]["matchLabels"] for policy in policies.values()]
    for name in ("api-deployment.yaml", "serve-deployment.yaml", "distill-job.yaml"):
        ((_, body),) = ((file, body) for file, body in MANIFESTS if file == name)
        labels = body["spec"]["template"]["metadata"]["labels"].items()
        assert sum(selector.items() <= labels for selector in chosen) == 1
    assert policies["distill-slm-worker"]["ingress"] == []
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())


# The image.


def test_the_image():
    lines = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    bases = [words for step, words in steps if step == "FROM"]
    assert all(re.match(r"(python:\d+\.\d+\.\d+-slim-\w+|\w+)( AS \w+)?$", base) for base in bases)
    users = [words for step, words in steps if step == "USER"]
    assert users[-1] == "10001:10001"
    (health,) = (words for step, words in steps if step == "HEALTHCHECK")
    command = json.loads(health[health.index("[") :])
    assert command[0] == "python" and command[2:] == ["--health"]
    home = next(words for step, words in steps if step == "WORKDIR")
    assert command[1].startswith(f"{home}/")  # whatever folder a container is started in
    assert (ROOT / command[1].removeprefix(f"{home}/")).is_file()
    assert "RUNS_DIR=/data/runs" in next(words for step, words in steps if step == "ENV" and "DATA_DIR" in words)
    for step, words in steps:
        if step == "COPY" and "--from" not in words:
            for source in shlex.split(words)[:-1]:
                assert list(ROOT.glob(source)), source
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "runs", "data", ".venv"} <= set(ignored)


def test_a_script_runs_on_what_the_image_holds_of_the_repository(tmp_path):
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        step, _, words = line.partition(" ")
        if step == "COPY" and "--from" not in words and "/tmp" not in words:
            *sources, target = shlex.split(words)
            for source in (path for pattern in sources for path in ROOT.glob(pattern)):
                if source.is_dir():
                    shutil.copytree(source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, tmp_path / target)
    words = [sys.executable, "-I", "-c", "import runpy, sys; sys.path.insert(0, '.'); sys.argv = ['x', '--version']; "
             "runpy.run_path('serve_creditmix.py', run_name='__main__')"]  # fmt: skip
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=LONGEST)
    assert (result.returncode, result.stdout) == (0, f"distill-slm {cli.version()}\n"), result.stderr


def test_the_health_check_of_the_image(tmp_path):
    """Either script asks either server."""
    scripts = [load_script(name) for name in ("serve_distill", "serve_creditmix")]
    with serve_jobs(make_place(tmp_path)) as served:
        assert [script.main(["--health", "--port", str(served.port)]) for script in scripts] == [0, 0]
    assert [script.main(["--health", "--port", str(served.port)]) for script in scripts] == [1, 1]


def load_script(name: str):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The backend.


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(kubernetes_backend, "PAUSE", 0.05)
    with start_cluster() as (running, url):
        running.url = url
        yield running


@pytest.fixture
def served(cluster, tmp_path, monkeypatch):
    """The service on the cluster; its workers mount the same folder."""
    data = make_place(tmp_path)
    monkeypatch.setattr(Service, "make_backend", lambda service: (backend(cluster.url, service.jobs_dir), 1000))
    with serve_jobs(data, backend="kubernetes", max_running=None) as running:
        running.cluster = cluster
        yield running


def backend(url: str, jobs_dir: Path) -> KubernetesBackend:
    from kubernetes import client

    configuration = client.Configuration()
    configuration.host, configuration.api_key = url, {"authorization": TOKEN}
    template = read_template(str(K8S / "distill-job.yaml"))
    api = client.ApiClient(configuration)
    return KubernetesBackend(jobs_dir, api, "team", template, "registry.local/slm:1.2.3", Device(False, None))


def name_of(job_id: str, attempt: int = 1) -> str:
    return f"distill-{job_id}-{attempt}"


def test_a_job_of_the_cluster(served, cluster):
    job_id = served.submit("slow", max_steps=5, export_onnx=True)
    status = served.until(job_id)
    assert status["state"] == "succeeded", status
    body = cluster.jobs[name_of(job_id)]
    assert body["metadata"]["labels"]["distill-slm/job"] == job_id
    pod = body["spec"]["template"]
    assert pod["metadata"]["labels"]["distill-slm/job"] == job_id
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.local/slm:1.2.3"
    folder = str(served.artifacts(job_id).parent)
    assert container["args"] == ["-m", "common.jobs.worker", folder, "--attempt", "1"]
    listed = served.ask("GET", f"/artifacts/{job_id}")[1]["artifacts"]
    assert {"model.safetensors", "onnx/model.onnx"} <= {entry["path"] for entry in listed}
    for entry in listed:
        assert sha256((served.artifacts(job_id) / entry["path"]).read_bytes()) == entry["sha256"]
    assert [point["step"] for point in served.ask("GET", f"/metrics/{job_id}")[1]["points"]] == [1, 2, 3, 4, 5]


def test_a_pod_that_waits_is_queued(served, cluster):
    cluster.runs_pods = False
    job_id = served.submit("slow", max_steps=30)
    wait_for(lambda: name_of(job_id) in cluster.jobs)
    status = served.status(job_id)
    assert (status["state"], status["started"], status["ahead"]) == ("queued", None, None)
    cluster.run_pod(name_of(job_id))
    assert served.until(job_id, "running")["started"] is not None
    assert served.until(job_id)["state"] == "succeeded"


def test_a_failure_of_the_training(served):
    job_id = served.submit("failing")
    status = served.until(job_id)
    assert (status["state"], status["error"]["exit_code"]) == ("failed", 2)
    assert status["error"]["reason"] == "the stand-in was told to fail; tell it otherwise"
    served.ask("POST", f"/resume/{job_id}")
    assert served.until(job_id)["state"] == "succeeded"
    assert served.cluster.created == [name_of(job_id, 1), name_of(job_id, 2)]
    assert (served.artifacts(job_id) / "steps.txt").read_text().split() == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (pod_that_ended(137, "OOMKilled"), "OOMKilled: it needed more memory than its limit"),
        (pod_that_ended(137, "Error"), "its pod ended with exit code 137 (Error)"),
        (
            {"metadata": {"name": "p"}, "status": {"reason": "Evicted", "message": "low on memory", "phase": "Failed"}},
            "Evicted: low on memory",
        ),
        (None, "DeadlineExceeded: it was active too long"),
    ],
)
def test_a_failure_of_the_cluster(served, cluster, pod, reason):
    cluster.runs_pods = False
    job_id = served.submit()
    wait_for(lambda: name_of(job_id) in cluster.jobs)
    cluster.pods[name_of(job_id)] = [pod] if pod else []
    cluster.end(name_of(job_id), "Failed", "DeadlineExceeded", "it was active too long")
    status = served.until(job_id)
    assert (status["state"], status["resumable"]) == ("failed", True)
    assert status["error"]["reason"].startswith(reason)


def test_an_evicted_pod_goes_on_in_another(served, cluster):
    job_id = served.submit("slow", max_steps=100)
    wait_for(lambda: (served.artifacts(job_id) / "steps.txt").exists())
    cluster.evict(name_of(job_id))
    status = served.until(job_id)
    assert (status["state"], status["attempt"]) == ("succeeded", 1)
    steps = list(map(int, (served.artifacts(job_id) / "steps.txt").read_text().split()))
    assert steps == [*range(1, 101)]  # from its checkpoint: none left out, none twice
    assert (served.artifacts(job_id).parent / "log.txt").read_text().count("training from step") == 2


def test_a_lost_watch_is_listed_again(served, cluster):
    cluster.runs_pods = False
    job_id = served.submit()
    wait_for(lambda: cluster.watchers and name_of(job_id) in cluster.jobs)
    lists = cluster.lists
    watchers, cluster.watchers = cluster.watchers, []  # nobody hears how it ends
    cluster.end(name_of(job_id), "Failed", "Unheard", "while the watch was lost")
    cluster.watchers = watchers
    cluster.lose_watch()
    assert served.until(job_id)["error"]["reason"] == "Unheard: while the watch was lost"
    assert cluster.lists > lists


def test_cancelling_deletes_the_job_and_its_pods(served, cluster):
    job_id = served.submit("slow", max_steps=4000)
    wait_for(lambda: (served.artifacts(job_id) / "steps.txt").exists())
    process = cluster.processes[name_of(job_id)]
    served.ask("POST", f"/cancel/{job_id}")
    assert served.until(job_id)["state"] == "cancelled"
    assert process.poll() is not None  # the pod was gone before the job was said to be
    assert cluster.jobs == {}


def test_a_job_that_somebody_deleted(served, cluster):
    cluster.runs_pods = False
    job_id = served.submit()
    wait_for(lambda: served.service.runner.backend.known)
    cluster.delete(name_of(job_id))
    status = served.until(job_id)
    assert (status["state"], status["error"]["reason"]) == ("failed", "its Kubernetes Job was deleted")


def test_a_cluster_that_does_not_answer_is_asked_again(served, cluster):
    cluster.refuse = (503, "the API server is down")
    job_id = served.submit()
    wait_for(lambda: served.service.store.find(job_id).handed)
    cluster.lose_watch()
    assert served.status(job_id)["state"] == "queued"
    cluster.refuse = None
    assert served.until(job_id)["state"] == "succeeded"
    assert cluster.created == [name_of(job_id)]


def test_a_job_that_the_cluster_refuses(served, cluster):
    cluster.refuse = (403, "exceeded quota: team")
    job_id = served.submit()
    status = served.until(job_id)
    assert status["state"] == "failed"
    assert "Kubernetes refuses the Job: exceeded quota: team" in status["error"]["reason"]


def test_a_server_that_comes_back_finds_its_jobs(cluster, tmp_path, monkeypatch):
    data = make_place(tmp_path)
    monkeypatch.setattr(Service, "make_backend", lambda service: (backend(cluster.url, service.jobs_dir), 1000))
    with serve_jobs(data, backend="kubernetes", max_running=None) as first:
        job_id = first.submit("slow", max_steps=150)
        first.until(job_id, "running")
    with serve_jobs(data, backend="kubernetes", max_running=None) as second:
        assert second.status(job_id)["state"] == "running"
        assert second.until(job_id)["state"] == "succeeded"
        assert cluster.created == [name_of(job_id)]
        # one that was handed over when its server died, and never reached the cluster
        second.service.runner.close()
        job = second.service.store.submit("sft", {}, second.service.store.find(job_id).commands, "f" * 16, None)
        claimed = second.service.store.claim(0, "queued")
        assert claimed.id == job.id
    with serve_jobs(data, backend="kubernetes", max_running=None) as third:
        wait_for(lambda: name_of(job.id) in cluster.created)
        third.until(job.id)


def test_only_what_the_role_allows_and_all_of_it(cluster, tmp_path, monkeypatch):
    """Least privilege: a round of everything asks for what k8s/rbac.yaml lists, no more and no less."""
    monkeypatch.setattr(Service, "make_backend", lambda service: (backend(cluster.url, service.jobs_dir), 1000))
    with serve_jobs(make_place(tmp_path), backend="kubernetes", max_running=None) as served:
        wait_for(lambda: cluster.watchers)
        cluster.runs_pods = False
        for end in ("fail", "cancel"):
            job_id = served.submit()
            wait_for(lambda job_id=job_id: name_of(job_id) in cluster.jobs)
            if end == "fail":
                cluster.end(name_of(job_id), "Failed", "x", "y")
            else:
                served.ask("POST", f"/cancel/{job_id}")
            served.until(job_id)
    assert cluster.asked == allowed(K8S / "rbac.yaml")


def test_template_and_device(tmp_path):
    template = read_template(str(K8S / "distill-job.yaml"))
    assert device_of(template, None) == Device(False, 8 << 30)
    limits = template["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits["nvidia.com/gpu"] = 1
    assert device_of(template, 8 << 30) == Device(True, 8 << 30)
    assert device_of(template, None) == Device(True, None)
    for text in ("", "kind: Job", "kind: Pod\nspec: {template: {spec: {containers: [{}]}}}", "[", None):
        path = tmp_path / "template.yaml"
        path.write_text(text) if text is not None else path.unlink()
        with pytest.raises(UserError, match=r"take k8s/distill-job.yaml"):
            read_template(str(path))


def test_without_a_cluster_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no cluster is configured"):
        KubernetesBackend.from_environment(tmp_path)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_reads_the_manifests():
    """The real client parses every file (it asks no server for a patch that is made locally)."""
    for path in sorted(K8S.glob("*.yaml")):
        if path.name == "trainjob.yaml":
            continue  # of a kind that it does not know without a server
        words = ["kubectl", "label", "--local", "-f", str(path), "checked=yes", "-o", "name"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST)
        assert result.returncode == 0, result.stderr
