# The whole stack in an image. What it runs is what `make setup` runs, which CI tests; no image was built in CI.
#   CPU:  docker build -t sailvl2 .
#   GPU:  docker build -t sailvl2 --build-arg GPU=yes .
#   Run:  docker run --rm --shm-size 8g -v "$PWD:/work" sailvl2 init mine --from smoke     (GPU: add --gpus all)
# PyTorch's and vLLM's wheels bring CUDA. DeepSpeed compiles CPU offload at first use and needs nvcc for it: for that,
# name a CUDA development image that has Python 3.11 with --build-arg BASE=...
ARG BASE=python:3.11-bookworm
FROM ${BASE}
ARG GPU=
WORKDIR /opt/posttrain
COPY . .
RUN make setup PYTHON=python3.11 GPU=${GPU}
ENV PATH=/opt/posttrain/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["posttrain"]
CMD ["--help"]
