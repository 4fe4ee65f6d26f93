# syntax=docker/dockerfile:1
# SGLang's own image of the pinned version, with Megatron-Core, Transformer Engine and this package beside it:
#
#     docker build --build-arg MAX_JOBS=16 -t treepo .
#     docker/check.sh treepo
#
# docs/docker.md says how to run it. The base's torch, SGLang and CUDA libraries stay as they are; everything
# else goes into a virtual environment on top, in the versions of constraints.txt.

FROM lmsysorg/sglang:v0.5.16-cu130 AS base

# Builds the wheels of Transformer Engine, for the base's torch, and of this package.
FROM base AS build
WORKDIR /build
COPY constraints.txt docker/image_packages.py docker/install.sh docker/transformer-engine.txt \
    docker/transformer_engine_path.py ./
RUN python3 image_packages.py check constraints.txt sglang torch transformers
# Compilers that run at a time; each takes up to 4 GB of memory.
ARG MAX_JOBS=8
# Transformer Engine's own wheels are for other builds of torch.
ENV NVTE_PYTORCH_FORCE_BUILD=TRUE \
    NVTE_FRAMEWORK=pytorch
RUN --mount=type=cache,target=/root/.cache/pip \
    MAX_JOBS=${MAX_JOBS} python3 -m pip wheel --no-deps --no-build-isolation \
        --wheel-dir /wheels/transformer-engine --requirement transformer-engine.txt
COPY pyproject.toml README.md LICENSE source/
COPY treepo source/treepo
COPY megatron_bridge source/megatron_bridge
COPY sglang_rollout source/sglang_rollout
# The packages that pip would install, less those that the base has.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip wheel --no-deps --wheel-dir /wheels ./source \
    && python3 -m pip install --dry-run --ignore-installed --quiet --report plan.json \
        --constraint constraints.txt /wheels/treepo-*.whl \
    && python3 image_packages.py missing plan.json > missing.txt

FROM base
RUN --mount=type=bind,from=build,source=/build,target=/build \
    --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    sh /build/install.sh /build /wheels /opt/treepo \
    && useradd --uid 10001 --create-home --shell /bin/bash treepo \
    && install --directory --owner=treepo --group=treepo /workspace
ENV PATH=/opt/treepo/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /workspace
COPY --chown=10001:10001 examples examples
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m CMD ["treepo", "doctor", "--only", "packages", "--only", "devices"]
ENTRYPOINT ["treepo"]
CMD ["--help"]
LABEL org.opencontainers.image.title="treepo" \
      org.opencontainers.image.description="Reinforcement learning for reasoning LLMs whose rollouts are trees" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/lmsysorg/sglang:v0.5.16-cu130"
