"""Jobs as batch/v1 Jobs of a Kubernetes cluster, one for each attempt, on the same volume as this server.

The manifest is k8s/distill-job.yaml (or JOB_TEMPLATE): resources, cards, volumes and security are decided there. Only
its name, labels, image and arguments are set here. The container runs `common.jobs.worker` on the job's folder, so that
log, progress and result come over the volume as on one machine; the cluster tells the rest.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import urllib3
import yaml

from common.cli import UserError, log
from common.jobs.backend import GONE, Device, Ended
from common.jobs.folder import JobFolder
from common.jobs.store import CANCELLED, FAILED, QUEUED, RUNNING, Job
from common.web.app import Environment

ROOT = Path(__file__).parents[2]
JOB_LABEL = "distill-slm/job"
OWN_JOBS = "app.kubernetes.io/name=distill-slm,app.kubernetes.io/component=worker"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
REQUEST = 10  # seconds a request to the API server may take
WATCH = 240  # seconds until a watch is opened anew
PAUSE = 2.0  # seconds before the next try when the API server did not answer
VOLUME = 30.0  # seconds a result may take to be seen here after its pod has ended


class KubernetesBackend:
    """The backend of a cluster.

    Args:
        jobs_dir: on a volume that the pods mount at the same path.
        client: `kubernetes.client.ApiClient`.
        template: a batch/v1 Job.
        device: what the template gives a job.
    """

    first_state = QUEUED  # the cluster decides when a job begins

    def __init__(
        self, jobs_dir: Path, client: Any, namespace: str, template: dict[str, Any], image: str | None, device: Device
    ) -> None:
        from kubernetes.client import BatchV1Api, CoreV1Api

        self.jobs_dir, self.namespace, self.template, self.image = jobs_dir, namespace, template, image
        self.device, self.batch, self.core = device, BatchV1Api(client), CoreV1Api(client)
        self._jobs: dict[str, Any] = {}  # the cluster's, by name, as the watch tells
        self._listed = threading.Event()
        self.known: set[str] = set()  # names that this server has seen in the cluster
        self._next_try: dict[str, float] = {}  # by job id, where the API server did not answer
        self._deleting: set[str] = set()
        self._ended: dict[str, float] = {}  # since when a Job has been complete without a result here
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="kubernetes", daemon=True).start()

    @classmethod
    def from_environment(cls, jobs_dir: Path) -> KubernetesBackend:
        """The cluster of this pod, else that of the kubeconfig. Raises UserError."""
        try:
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise UserError(
                "BACKEND=kubernetes needs the kubernetes client; pip install -r requirements/k8s.txt"
            ) from error

        env = Environment()
        try:
            config.load_config()
        except config.ConfigException as error:
            raise UserError(
                f"BACKEND=kubernetes: no cluster is configured ({error}); run in a pod, or set KUBECONFIG"
            ) from error
        path = env.text("JOB_TEMPLATE", str(ROOT / "k8s" / "distill-job.yaml"))
        inside = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.is_file() else "default"
        template, memory = read_template(path), env.number("GPU_MEMORY", 0)
        device = device_of(template, int(memory) or None)
        return cls(jobs_dir, client.ApiClient(), env.text("NAMESPACE", inside), template, env.text("IMAGE"), device)

    # What the runner asks.

    def start(self, job: Job) -> None:
        """Create the Job; one that exists already, from before a restart, is taken over.

        Raises:
            OSError: the cluster refuses it, or there is no room for its files.
        """
        from kubernetes.client import ApiException

        JobFolder(self.jobs_dir / job.id).prepare(job.attempt, job.commands)
        body = self.manifest(job)
        name = body["metadata"]["name"]
        try:
            try:
                created = self.batch.create_namespaced_job(self.namespace, body, _request_timeout=REQUEST)
            except ApiException as error:
                if error.status != 409:
                    raise
                created = self.batch.read_namespaced_job(name, self.namespace, _request_timeout=REQUEST)
            self._jobs.setdefault(name, created)  # the watch may have told of it, and more, already
            self.known.add(name)
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            status = getattr(error, "status", None) or 500
            if 400 <= status < 500 and status not in (404, 408, 429):
                raise OSError(f"Kubernetes refuses the Job: {message_of(error)}") from error
            log(f"job {job.id}: Kubernetes did not take it ({message_of(error)}); trying again")
            self._next_try[job.id] = time.monotonic() + PAUSE

    def look(self, job: Job) -> str | Ended:
        """QUEUED, RUNNING, GONE, or how the job ended."""
        if not self._listed.is_set() or time.monotonic() < self._next_try.get(job.id, 0):
            return QUEUED
        name = name_of(job)
        known = self._jobs.get(name) or self._read(name)
        result = JobFolder(self.jobs_dir / job.id).result(job.attempt)
        if known is None:
            if result:
                return Ended(result["state"], result["error"], result["artifacts"])
            if job.cancel:
                return Ended(CANCELLED)
            return self._failed(job, "its Kubernetes Job was deleted") if name in self.known else GONE
        self.known.add(name)
        over = {condition.type: condition for condition in known.status.conditions or () if condition.status == "True"}
        if "Complete" in over or "Failed" in over:
            if result:
                return Ended(result["state"], result["error"], result["artifacts"])
            if job.cancel:
                return Ended(CANCELLED)
            if "Failed" in over:
                return self._failed(job, self._reason(name, over["Failed"]))
            since = self._ended.setdefault(name, time.monotonic())
            if time.monotonic() - since > VOLUME:
                return self._failed(job, "its pod completed, but left no result on the volume; check the PVC")
        return RUNNING if known.status.ready else QUEUED

    def stop(self, job: Job) -> None:
        """Delete the Job and, before it is gone, its pods; to be called again."""
        name = name_of(job)
        known = self._jobs.get(name)
        if known is not None and name not in self._deleting:
            self._ask(lambda: self.batch.delete_namespaced_job(
                name, self.namespace, propagation_policy="Foreground", _request_timeout=REQUEST))  # fmt: skip
            self._deleting.add(name)
        if known is None:  # it was never created
            self._next_try.pop(job.id, None)

    def forget(self, job: Job) -> None:
        """After a job has ended. Its Job stays for a look with kubectl until its ttlSecondsAfterFinished."""
        self.known.discard(name_of(job))
        self._deleting.discard(name_of(job))
        self._ended.pop(name_of(job), None)
        self._next_try.pop(job.id, None)

    def close(self) -> None:
        """Watch no longer; the cluster's Jobs go on."""
        self._closed.set()

    def manifest(self, job: Job) -> dict[str, Any]:
        """The Job of an attempt."""
        body = copy.deepcopy(self.template)
        pod = body["spec"]["template"]
        body["metadata"]["name"] = name_of(job)
        for metadata in (body["metadata"], pod.setdefault("metadata", {})):
            metadata.setdefault("labels", {})[JOB_LABEL] = job.id
        container = pod["spec"]["containers"][0]
        container["image"] = self.image or container["image"]
        container["command"] = ["python"]
        folder = str(self.jobs_dir / job.id)
        container["args"] = ["-m", "common.jobs.worker", folder, "--attempt", str(job.attempt)]
        return body

    def _failed(self, job: Job, reason: str) -> Ended:
        tail = JobFolder(self.jobs_dir / job.id).log_tail()
        return Ended(FAILED, {"reason": reason, "exit_code": None, "log": tail})

    # What the cluster tells.

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer; None for what does not exist. Raises OSError where there is no answer."""
        from kubernetes.client import ApiException

        try:
            return question()
        except ApiException as error:
            if error.status == 404:
                return None
            raise OSError(f"Kubernetes: {message_of(error)}") from error
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"Kubernetes does not answer ({type(error).__name__})") from error

    def _read(self, name: str) -> Any:
        """A Job that the watch has not told of: there may be one nevertheless."""
        known = self._ask(lambda: self.batch.read_namespaced_job(name, self.namespace, _request_timeout=REQUEST))
        return known and self._jobs.setdefault(name, known)

    def _reason(self, name: str, condition: Any) -> str:
        """Why a Job has failed, from its pods where they are still there."""
        selector = f"batch.kubernetes.io/job-name={name}"
        pods = self._ask(
            lambda: self.core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=REQUEST)
        )
        for pod in reversed(pods.items if pods else []):
            if pod.status.reason:  # Evicted, NodeLost, ...
                return f"{pod.status.reason}: {pod.status.message or 'the cluster gives no reason'}"
            for container in pod.status.container_statuses or ():
                ended = container.state.terminated
                if ended is not None and ended.reason == "OOMKilled":
                    return "OOMKilled: it needed more memory than its limit; raise it in the job template"
                if ended is not None and ended.exit_code:
                    return f"its pod ended with exit code {ended.exit_code} ({ended.reason})"
        return f"{condition.reason}: {condition.message}"

    def _watch(self) -> None:
        """Keep `_jobs` as the cluster has them. A watch that ends or is lost (410) begins again with a list."""
        from kubernetes.watch import Watch

        trouble = ""
        while not self._closed.is_set():
            try:
                listed = self.batch.list_namespaced_job(
                    self.namespace, label_selector=OWN_JOBS, _request_timeout=REQUEST
                )
                self._jobs = {job.metadata.name: job for job in listed.items}
                self._listed.set()
                stream = Watch().stream(
                    self.batch.list_namespaced_job,
                    self.namespace,
                    label_selector=OWN_JOBS,
                    resource_version=listed.metadata.resource_version,
                    timeout_seconds=WATCH,
                    _request_timeout=WATCH + REQUEST,
                )
                for event in stream:
                    name = event["object"].metadata.name
                    if event["type"] == "DELETED":
                        self._jobs.pop(name, None)
                    else:
                        self._jobs[name] = event["object"]
                trouble = ""
            except Exception as error:  # without this thread, nothing would be heard any more
                expired = getattr(error, "status", None) == 410  # what has happened since is no longer known there
                if not expired and message_of(error) != trouble and not self._closed.is_set():
                    trouble = message_of(error)
                    log(f"Kubernetes: the watch was lost ({trouble}); trying again")
                self._closed.wait(PAUSE / 20 if expired else PAUSE)


def name_of(job: Job) -> str:
    """The name of an attempt's Job: the same each time it is asked for, so that none is created twice."""
    return f"distill-{job.id}-{job.attempt}"


def message_of(error: Exception) -> str:
    """An API error in one line."""
    try:
        return json.loads(error.body)["message"]
    except (AttributeError, TypeError, ValueError, KeyError):
        return str(getattr(error, "reason", None) or error).split("\n")[0]


def read_template(path: str) -> dict[str, Any]:
    """The Job of a YAML file. Raises UserError."""
    try:
        template = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        kind, containers = template["kind"], template["spec"]["template"]["spec"]["containers"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"JOB_TEMPLATE={path} holds no Job ({error}); take k8s/distill-job.yaml") from error
    if kind != "Job" or len(containers) != 1:
        raise UserError(f"JOB_TEMPLATE={path} must be one Job with one container; take k8s/distill-job.yaml")
    return template


def device_of(template: dict[str, Any], card_memory: int | None) -> Device:
    """What a template gives a job.

    Args:
        card_memory: bytes of the cluster's cards, which a manifest cannot say.
    """
    from kubernetes.utils import parse_quantity

    limits = template["spec"]["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    if any(name.endswith("/gpu") for name in limits):
        return Device(True, card_memory)
    return Device(False, int(parse_quantity(limits["memory"])) if "memory" in limits else None)
