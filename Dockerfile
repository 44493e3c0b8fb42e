# One image for Ray nodes, jobs, the service and the MLflow server; not root.
#
#   docker build --build-arg TORCH_INDEX_URL=… --tag pixellm:0.1.0-cpu .          PyTorch's CPU wheel index
#   docker build --target cuda --tag pixellm:0.1.0-cuda .                         torch with its CUDA libraries
#
# The layers, from what changes least to what changes most: system, dependencies (requirements.lock, torch), our wheel.
FROM python:3.11-slim-bookworm AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY constraints.txt requirements.lock ./
# The dependencies alone, so that a change of our code does not install them again. A file with another hash is refused.
RUN pip install --require-hashes --no-deps --requirement requirements.lock
# After them, for torch's index need not have the versions of what torch needs. It and its CUDA libraries have no hash.
ARG TORCH_INDEX_URL=""
RUN pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch \
 && pip check

FROM dependencies AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY platform platform
COPY jobs jobs
COPY serve serve
COPY recipes recipes
COPY pixellm pixellm
RUN pip wheel --no-deps --constraint constraints.txt --wheel-dir /dist .

FROM python:3.11-slim-bookworm AS cuda
# g++ for DeepSpeed, which compiles an operation at first use; wget for the probes that KubeRay adds to Ray's pods.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home pixellm \
 && install --directory --owner=1000 --group=1000 /shared
COPY --from=dependencies /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl
COPY serve/config.yaml /etc/pixellm/serve.yaml
USER 1000
WORKDIR /shared
CMD ["pixellm", "--help"]

# The default. Compiles DeepSpeed's operation now, so that no worker waits a minute for it.
FROM cuda AS cpu
RUN if [ -e /opt/venv/lib/python3.11/site-packages/nvidia ]; \
      then echo "torch came with CUDA: give --build-arg TORCH_INDEX_URL=, PyTorch's CPU wheel index" >&2; exit 1; fi \
 && python -m pixellm.jobs.train.warm_up
