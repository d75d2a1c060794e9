# Both servers and every script. Build once; the job service, or the inference server for the runs of this folder:
#
#   docker build -t distill-slm:0.2.0 .
#   docker run --init -p 8000:8000 -v slm:/data distill-slm:0.2.0             # add --gpus all for cards
#   docker run --init -p 8000:8000 --user "$(id -u):$(id -g)" -v "$PWD:/data" -w /data distill-slm:0.2.0 \
#     python /app/serve_creditmix.py --host 0.0.0.0 --port 8000
#
# PIP_EXTRA_INDEX_URL chooses another build of torch, e.g. the one for CPUs, which is much smaller.
FROM python:3.12.12-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /tmp/
COPY requirements /tmp/requirements
# neither server writes a GGUF
RUN pip install --no-cache-dir --no-compile \
    -r /tmp/requirements.txt -r /tmp/requirements/k8s.txt $(grep ^torchao /tmp/requirements/export.txt)

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/data/huggingface \
    GGUF_CACHE=/data/gguf \
    DATA_DIR=/data \
    ALLOWED_ROOTS=/data \
    RUNS_DIR=/data/runs
WORKDIR /app
COPY *.py pyproject.toml LICENSE ./
COPY common common
COPY recipes recipes
COPY k8s k8s
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=6s --start-period=60s --retries=3 CMD ["python", "/app/serve_distill.py", "--health"]
CMD ["python", "serve_distill.py", "--host", "0.0.0.0", "--port", "8000"]
