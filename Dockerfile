# syntax=docker/dockerfile:1.7
# One image for the Ray head, its workers, the tracking server and the client that submits. The CUDA libraries
# come with torch, so the same image serves hosts with and without GPUs. Versions: constraints.txt.
FROM python:3.11.14-slim-bookworm

# wget: for the health checks of docker-compose.yml and of KubeRay.
# hadolint ignore=DL3008 # Debian keeps no old versions to pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*

# Ray and the jobs that it runs write below the home of a user that owns nothing else. The folders of the volumes
# exist here because a new volume takes over their owner.
RUN useradd --create-home --uid 1000 --user-group ddpm \
    && install --directory --owner=ddpm --group=ddpm /srv/runs /srv/mlartifacts

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/ddpm

# The dependencies alone: gigabytes that change seldom, in a layer of their own.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['cluster'], sep='\n')" > requirements.txt \
    && pip install --requirement requirements.txt --constraint constraints.txt

COPY LICENSE README.md hatch_build.py ./
COPY conf conf
COPY ddpm ddpm
COPY pipeline pipeline
# No history comes along: `make image` gives the commit that runs are marked with. Blank: it is not known.
ARG COMMIT=
RUN if [ -n "$COMMIT" ]; then printf %s "$COMMIT" > pipeline/COMMIT; fi \
    && pip install --no-deps .

USER 1000:1000
WORKDIR /home/ddpm
CMD ["ddpm", "--help"]
