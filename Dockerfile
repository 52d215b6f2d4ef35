# metarun with a CPU build of torch:
#   docker build -t metarun .
#   docker run --rm -v "$PWD/outputs:/work/outputs" -v "$PWD/data:/work/data:ro" metarun algo=maml task=sinusoid
# For a GPU, build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 and run with --gpus all.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# engine=compile needs a C++ compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.6"

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY metarun metarun
RUN pip install --no-cache-dir .

WORKDIR /work
ENTRYPOINT ["metarun"]
