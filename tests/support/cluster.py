"""A stand-in for a Kubernetes API server: it checks every body against the schemas and plays what a cluster does.

Where a test does not say otherwise, a Job's container is run here, as a kubelet would; it can also be evicted, or the
watch be lost. What is asked for has to be in the Role of k8s/rbac.yaml.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import kubernetes_validate
import yaml
from kubernetes.utils import parse_quantity

from support.inputs import ROOT
from support.processes import LONGEST

VERSION = "1.37"
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
TOKEN = "Bearer token"


def check(body: dict[str, Any]) -> None:
    """Raises for what an API server would refuse: by the schemas, and what they do not say."""
    kubernetes_validate.validate(body, VERSION, strict=True)
    assert DNS_LABEL.fullmatch(body["metadata"]["name"]), body["metadata"]["name"]
    for labels in find(body, "labels") + find(body, "matchLabels"):
        for name, value in labels.items():
            prefix, _, plain = name.rpartition("/")
            assert LABEL_VALUE.fullmatch(plain) and plain and (not prefix or len(prefix) < 254), name
            assert LABEL_VALUE.fullmatch(value), value
    for resources in find(body, "resources"):
        for part in (resources.get("requests", {}), resources.get("limits", {})) if isinstance(resources, dict) else ():
            for quantity in part.values():
                parse_quantity(quantity)
    for pod in pods_of(body):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    if body["kind"] == "Job":
        assert body["spec"]["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
        if "podFailurePolicy" in body["spec"]:
            assert body["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def find(value: Any, name: str) -> list[Any]:
    """Every value under a key of this name."""
    if isinstance(value, list):
        return [found for item in value for found in find(item, name)]
    if not isinstance(value, dict):
        return []
    own = [value[name]] if name in value else []
    return own + [found for item in value.values() for found in find(item, name)]


def pods_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs in a manifest."""
    return [template["spec"] for template in find(body, "template") if "containers" in template.get("spec", {})]


class Cluster:
    """Jobs and pods by name, and those who watch."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, list[dict[str, Any]]] = {}
        self.asked: set[tuple[str, str]] = set()  # (verb, resource)
        self.faults: list[str] = []
        self.created: list[str] = []
        self.watchers: list[queue.Queue] = []
        self.lists = 0
        self.runs_pods = True  # else a Job waits
        self.refuse: tuple[int, str] | None = None  # status and message for every request
        self.processes: dict[str, subprocess.Popen] = {}
        self.version = 100
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.lock = threading.RLock()

    # What a test plays.

    def tell(self, kind: str, name: str) -> None:
        with self.lock:
            self.version += 1
            self.jobs[name]["metadata"]["resourceVersion"] = str(self.version)
            event = {"type": kind, "object": json.loads(json.dumps(self.jobs[name]))}
            self.history.append((self.version, event))
            for watcher in self.watchers:
                watcher.put(event)

    def status(self, name: str, **status: Any) -> None:
        with self.lock:
            if name in self.jobs:
                self.jobs[name]["status"] |= status
                self.tell("MODIFIED", name)

    def end(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.status(name, active=0, ready=0, conditions=[condition])

    def run_pod(self, name: str) -> None:
        """Run a Job's container here, and end the Job as its controller would."""
        container = self.jobs[name]["spec"]["template"]["spec"]["containers"][0]
        assert container["command"] == ["python"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *container["args"]], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        self.processes[name] = process
        self.status(name, active=1, ready=1)

        def wait() -> None:
            code = process.wait()
            if self.processes.get(name) is not process or name not in self.jobs:
                return
            if code == 0:
                self.end(name, "Complete")
            elif code in (75, 143):  # the podFailurePolicy: another pod
                self.run_pod(name)
            else:
                self.pods[name] = [pod_that_ended(code, "Error")]
                self.end(name, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")

        threading.Thread(target=wait, daemon=True).start()

    def evict(self, name: str) -> None:
        """The pod is told to go; the Job's controller makes another."""
        self.status(name, ready=0)
        self.processes[name].send_signal(signal.SIGTERM)

    def kill_pod(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(LONGEST)

    def lose_watch(self) -> None:
        """Every watch ends with 410 Gone: what happened meanwhile has to be listed."""
        gone = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": 410,
            "reason": "Expired",
            "message": "too old",
        }
        with self.lock:
            for watcher in self.watchers:
                watcher.put({"type": "ERROR", "object": gone})
                watcher.put(None)

    # What the server answers.

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = body["metadata"]["name"]
        with self.lock:
            if name in self.jobs:
                return 409, failure(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
            self.jobs[name] = {**body, "status": {}}
            self.created.append(name)
            self.tell("ADDED", name)
        if self.runs_pods:
            self.run_pod(name)
        return 201, self.jobs[name]

    def delete(self, name: str) -> tuple[int, dict[str, Any]]:
        if name not in self.jobs:
            return 404, failure(404, "NotFound", f'jobs.batch "{name}" not found')

        def go() -> None:  # in the foreground: the pods first
            self.kill_pod(name)
            with self.lock:
                self.tell("DELETED", name)
                del self.jobs[name]

        threading.Thread(target=go, daemon=True).start()
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}


def pod_that_ended(code: int, reason: str) -> dict[str, Any]:
    ended = {"terminated": {"exitCode": code, "reason": reason}}
    container = {"name": "worker", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": ended}
    return {"metadata": {"name": "pod"}, "status": {"phase": "Failed", "containerStatuses": [container]}}


def failure(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_) -> None:
        pass

    def answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self, verb: str) -> None:
        cluster, url = self.cluster, urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        found = re.fullmatch(r"/(?:apis/batch|api)/v1/namespaces/team/(jobs|pods)(?:/([^/]+))?", url.path)
        if cluster.refuse:
            code, message = cluster.refuse
            return self.answer(code, failure(code, "Refused", message))
        if self.headers.get("Authorization") != TOKEN or not found:
            cluster.faults.append(f"{verb} {self.path}")
            return self.answer(401 if found else 404, failure(404, "NotFound", url.path))
        resource, name = found.groups()
        verb = "list" if verb == "get" and name is None else verb
        watching = query.get("watch") == "true" or query.get("watch") == "True"
        cluster.asked.add(("watch" if watching else verb, resource))
        try:
            if verb == "create":
                check(body)
        except Exception as error:
            cluster.faults.append(str(error))
            return self.answer(422, failure(422, "Invalid", str(error)))
        if resource == "pods":
            job = query["labelSelector"].removeprefix("batch.kubernetes.io/job-name=")
            return self.answer(
                200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": cluster.pods.get(job, [])}
            )
        if watching:
            return self.watch(int(query["resourceVersion"]))
        if verb == "create":
            return self.answer(*cluster.create(body))
        if verb == "delete":
            return self.answer(*cluster.delete(name))
        if verb == "list":
            cluster.lists += 1
            with cluster.lock:
                items = [job for job in cluster.jobs.values() if matches(job, query["labelSelector"])]
                metadata = {"resourceVersion": str(cluster.version)}
                return self.answer(
                    200, {"kind": "JobList", "apiVersion": "batch/v1", "metadata": metadata, "items": items}
                )
        if name in cluster.jobs:
            return self.answer(200, cluster.jobs[name])
        return self.answer(404, failure(404, "NotFound", f'jobs.batch "{name}" not found'))

    def watch(self, since: int) -> None:
        """What has happened after a version, and what happens from now on."""
        events: queue.Queue = queue.Queue()
        with self.cluster.lock:
            for version, event in self.cluster.history:
                if version > since:
                    events.put(event)
            self.cluster.watchers.append(events)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            while (event := events.get()) is not None:
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        with self.cluster.lock:
            self.cluster.watchers.remove(events)

    def do_GET(self) -> None:
        self.handle_any("get")

    def do_POST(self) -> None:
        self.handle_any("create")

    def do_DELETE(self) -> None:
        self.handle_any("delete")


def matches(job: dict[str, Any], selector: str) -> bool:
    return all(job["metadata"]["labels"].get(name) == value for name, _, value in
               (part.partition("=") for part in selector.split(",")))  # fmt: skip


@contextlib.contextmanager
def start_cluster() -> Iterator[tuple[Cluster, str]]:
    """A cluster and the URL of its API server."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield cluster, f"http://127.0.0.1:{server.server_port}"
    finally:
        for name in list(cluster.processes):
            cluster.kill_pod(name)
        cluster.lose_watch()
        server.shutdown()
        server.server_close()
    assert cluster.faults == []


def allowed(rbac: Path) -> set[tuple[str, str]]:
    """(verb, resource) that a Role allows."""
    (role,) = (body for body in yaml.safe_load_all(rbac.read_text()) if body["kind"] == "Role")
    return {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }  # fmt: skip
