"""What the environment sets of the inference server."""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import UserError
from common.models import gguf_import, llama_cpp
from common.models.source import ENGINES, LLAMA_CPP
from common.serving.messages import HostSettings
from common.tasks.ranking.loading import load_task
from common.teachers.cascade.settings import TIMEOUT, CascadeSettings, RunTeacher, endpoint
from common.web.app import Environment


@dataclass(frozen=True)
class ServerSettings:
    """What the environment may set; the defaults are in `from_environment`.

    Attributes:
        runs_dir: folder of the runs.
        base_model: what "base" stands for (`base_model`); None: the base of the adapters found.
        idp_schema: path of the schema of requests that bring none.
        max_bases: base models in memory at once.
        host: how models are loaded and batched.
        request_timeout: seconds until a request is answered with 504.
        api_key: None lets everybody in.
        audit_log: path; None: none is written.
        audit_inputs: write the texts of requests, too.
        audit_max_bytes: size at which the audit log is rotated.
        preload: load the base and the named runs at the start.
        max_pdf_bytes: of a PDF that is sent.
        cascade: who is asked where a run is not sure of a label; None: nobody.
        allowed_hosts: names by which the server may be asked for without a key, beside localhost and addresses.
    """

    runs_dir: str
    base_model: str | None
    idp_schema: str
    max_bases: int
    host: HostSettings
    request_timeout: float
    max_body_bytes: int
    api_key: str | None
    audit_log: str | None
    audit_inputs: bool
    audit_max_bytes: int
    preload: bool
    allowed_hosts: tuple[str, ...] = ()
    cascade: CascadeSettings | None = None
    max_pdf_bytes: int = 20 << 20

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """Raises UserError for a value that cannot be."""
        env = Environment()
        runs_dir = env.text("RUNS_DIR", "runs")
        task = load_task(env.text("TASK"))
        nulls = env.whole("NUM_NULL_PROMPTS", len(task.null_inputs))
        if nulls > len(task.null_inputs):
            raise UserError(f"NUM_NULL_PROMPTS={nulls} is more than the {len(task.null_inputs)} that there are")
        return cls(
            runs_dir=runs_dir,
            base_model=base_model(env),
            idp_schema=env.text("IDP_SCHEMA", "data/idp_schema.json"),
            max_bases=env.whole("MAX_BASES", 2),
            host=HostSettings(
                max_batch_tokens=env.whole("MAX_BATCH_TOKENS", 8192),
                max_wait=env.number("MAX_WAIT_MS", 0) / 1000,
                max_queue=env.whole("MAX_QUEUE", 1024),
                task=task,
                num_null_prompts=nulls,
                runs_dir=runs_dir,
                load_in_4bit=env.choice("LOAD_IN_4BIT", ("auto", "on", "off")),
                auto_fit=env.switch("AUTO_FIT"),
            ),
            request_timeout=env.number("REQUEST_TIMEOUT", 120, least=0.001),
            max_body_bytes=env.whole("MAX_BODY_BYTES", 1 << 20),
            api_key=env.text("API_KEY"),
            audit_log=env.text("AUDIT_LOG"),
            audit_inputs=env.switch("AUDIT_INPUTS"),
            audit_max_bytes=env.whole("AUDIT_MAX_BYTES", 64 << 20),
            preload=env.switch("PRELOAD"),
            allowed_hosts=env.names("ALLOWED_HOSTS"),
            cascade=cascade_settings(env),
            max_pdf_bytes=env.whole("MAX_PDF_BYTES", cls.max_pdf_bytes),
        )


def base_model(env: Environment) -> str | None:
    """What "base" is set to: a folder or a Hub id; of a GGUF that made of it, or with ENGINE=llama_cpp its own.

    Raises:
        UserError: ENGINE=llama_cpp without a GGUF, or without llama.cpp.
    """
    name = env.text("BASE_MODEL")
    if env.choice("ENGINE", ENGINES) != LLAMA_CPP:
        return name and gguf_import.model_folder(name)
    if not name:
        raise UserError("ENGINE=llama_cpp runs the GGUF that BASE_MODEL names; set BASE_MODEL to one, or unset ENGINE")
    folder = gguf_import.packed_folder(name)
    if gguf_import.file_of(folder) is None:
        raise UserError(
            f"ENGINE=llama_cpp runs a GGUF as it is, and BASE_MODEL={name} is none; make one with export_model.py "
            "--format gguf --quant Q4_K_M, or unset ENGINE"
        )
    llama_cpp.library()
    return folder


def cascade_settings(env: Environment) -> CascadeSettings | None:
    """The cascade; None where there is no teacher. Raises UserError for a value that cannot be."""
    url, run = env.text("CASCADE_ENDPOINT"), env.text("CASCADE_RUN")
    if not (url or run):
        given = [name for name in ("CASCADE_MODEL", "CASCADE_BELOW", "CASCADE_PER_HOUR") if env.text(name)]
        if given or env.switch("CASCADE_KEEP"):
            name = given[0] if given else "CASCADE_KEEP"
            raise UserError(f"{name} goes with CASCADE_ENDPOINT or CASCADE_RUN; set one of them, or unset {name}")
        return None
    if url and run:
        raise UserError("CASCADE_ENDPOINT and CASCADE_RUN are two teachers; set one of them")
    timeout = env.number("CASCADE_TIMEOUT", TIMEOUT, least=0.001)
    below = env.number("CASCADE_BELOW", 0.0) or None
    if below and below >= 1:
        raise UserError(f"CASCADE_BELOW={below:g} is no probability below 1; set it to one or unset it")
    return CascadeSettings(
        endpoint(url, env.text("CASCADE_MODEL"), timeout) if url else RunTeacher(run or ""),
        below,
        env.whole("CASCADE_PER_HOUR", 1) if env.text("CASCADE_PER_HOUR") else None,
        timeout,
        env.switch("CASCADE_KEEP"),
    )
