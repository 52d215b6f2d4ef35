# metarun in a container:
#   docker build -t metarun .
#   docker run --rm -v "$PWD/outputs:/runs/outputs" -v "$PWD/data:/runs/data:ro" metarun algo=maml task=sinusoid
# On Linux, pip's newest torch brings CUDA: run with --gpus all. For a smaller image, name an index that has a CPU build:
# --build-arg PIP_ARGUMENTS="--index-url URL".
FROM python:3.12-slim

ARG PIP_ARGUMENTS=""

# engine=compile needs a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir $PIP_ARGUMENTS "torch>=2.6"

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY metarun metarun
RUN pip install --no-cache-dir .

WORKDIR /runs
ENTRYPOINT ["metarun"]
