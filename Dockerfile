# syntax=docker/dockerfile:1
# One file, five images: docker build --target data|train|finetune|test|serve -t pokemon_nb:serve .
# Every image is for CPUs and runs as a user without rights; for GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG BASE=python:3.11-slim

# ---- what all of them share: an environment with torch and the pinned requirements, without the project itself
# hadolint ignore=DL3006
FROM ${BASE} AS base
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HUB_OFFLINE=1 WANDB_MODE=offline GRADIO_ANALYTICS_ENABLED=False MPLCONFIGDIR=/tmp/matplotlib
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python3 -m venv /opt/venv && useradd --uid 10001 --create-home pokemon && mkdir /app && chown pokemon /app
WORKDIR /app
COPY constraints.txt settings.ini /tmp/src/
# Requirements change less often than code; pip reads the lists from settings.ini, as setup.py does
RUN grep -i '^torch==' /tmp/src/constraints.txt > /tmp/src/torch.txt && \
    pip install --index-url "$TORCH_INDEX" -r /tmp/src/torch.txt && \
    list() { python3 -c 'import configparser as c, sys; i = c.ConfigParser(delimiters=["="]); i.read("/tmp/src/settings.ini"); print("\n".join(i["DEFAULT"][k] for k in sys.argv[1:]).replace(" ", "\n"))' "$@"; } && \
    list requirements offline_requirements > /tmp/src/run.txt && \
    pip install -c /tmp/src/constraints.txt -r /tmp/src/run.txt && \
    for extra in data dvc finetune dev; do list "${extra}_requirements" > "/tmp/src/$extra.txt"; done

# ---- the project itself, installed once
FROM base AS code
COPY setup.py settings.ini README.md LICENSE /tmp/code/
COPY pokemon_nb /tmp/code/pokemon_nb
RUN chmod -R a+rX /tmp/code && pip install --no-deps /tmp/code && rm -rf /tmp/code

# ---- builds and checks the dataset: docker run -v "$PWD/data:/app/data" pokemon_nb:data --source critters
FROM code AS data
RUN pip install -c /tmp/src/constraints.txt -r /tmp/src/data.txt -r /tmp/src/dvc.txt
USER 10001
ENTRYPOINT ["pokemon_data"]
CMD ["--help"]

# ---- the training job: the notebook itself, by papermill. Mount data and runs; further arguments are papermill's
FROM code AS train
COPY --chown=pokemon nbs/05_train.ipynb /app/nbs/
USER 10001
RUN mkdir /app/runs
ENTRYPOINT ["papermill", "nbs/05_train.ipynb", "runs/05_train.ipynb", "--log-output", "--no-progress-bar", "-p", "out", "runs/job"]

# ---- the same with what fine-tuning needs (peft, accelerate)
FROM train AS finetune
USER 0
RUN pip install -c /tmp/src/constraints.txt -r /tmp/src/finetune.txt
USER 10001

# ---- lint and fast tests, on a copy of the whole repository
FROM code AS test
RUN pip install -c /tmp/src/constraints.txt -r /tmp/src/dev.txt
COPY --chown=pokemon . /app
USER 10001
CMD ["python3", "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/test_serving.py", "tests/test_gaussian.py", "tests/test_metrics.py"]

# ---- the service; last, so that a plain `docker build .` makes it
FROM code AS serve
ENV PORT=8080
EXPOSE 8080
USER 10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/healthz\", timeout=2)"]
CMD ["pokemon_serve", "--host", "0.0.0.0"]
