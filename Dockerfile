# Two images, each with the package and what serving, training and buckets need:
#   docker build --target cpu --tag v4-jax .        runs the demo:  docker run --rm v4-jax
#   docker build --target tpu --tag v4-jax:tpu .    on a TPU VM:    docker run --rm --privileged --network host v4-jax:tpu
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY v4_jax v4_jax
COPY commands commands
COPY infer infer
COPY planning planning
COPY sharding sharding
COPY train train
RUN pip wheel --quiet --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
COPY constraints.txt /wheel/
COPY --from=build /wheel /wheel
RUN pip install --quiet --constraint /wheel/constraints.txt "$(ls /wheel/*.whl)[train,serve,remote]" && v4-jax --version
ENTRYPOINT ["v4-jax"]
CMD ["demo"]

# The TPUs' device files belong to root.
FROM base AS tpu
RUN pip install --quiet --constraint /wheel/constraints.txt "$(ls /wheel/*.whl)[tpu]"

FROM base AS cpu
RUN useradd --create-home v4
USER v4
WORKDIR /home/v4
