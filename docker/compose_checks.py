"""What users of the running compose file see. Runs in the server's container, from which all services are on loopback.

Standard library only. Prints a line for each thing that was seen; the first that is not as it should be ends it.
"""

import base64
import json
import sys
import time
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

SERVER, PROMETHEUS, GRAFANA = 8000, 9090, 3000
QUESTION = "What are the symptoms of iron deficiency anemia and how is it treated?"
COUNT = 'brainstacks_requests_total{endpoint="/v1/chat/completions",status="200"}'
WAIT_SECONDS = 60.0
GRAFANA_LOGIN = base64.b64encode(b"admin:admin").decode()


def call(port: int, path: str, body: object = None) -> Any:
    """The JSON that a service answers with."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"content-type": "application/json"}
    if port == GRAFANA:
        headers["authorization"] = f"Basic {GRAFANA_LOGIN}"
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        raise SystemExit(f"port {port} {path}: {response.status} {text}")
    return json.loads(text)


def say(text: str) -> None:
    """For whoever watches the run."""
    print(f"compose-test       : {text}", flush=True)


def ask() -> None:
    """One question through the chat API, which the router must give a mix."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    answer = call(SERVER, "/v1/chat/completions", body)
    text, mix = answer["choices"][0]["message"]["content"], answer["brainstacks"]["mix"]
    if not (text.strip() and mix and all(0 < weight <= 1 for weight in mix.values())):
        raise SystemExit(f"not an answer with a mix: {answer}")
    say(f"mix {json.dumps(mix)} text {json.dumps(text)}")


def query(expression: str) -> list[dict[str, Any]]:
    """What Prometheus has for an expression now."""
    answer = call(PROMETHEUS, "/api/v1/query?" + urlencode({"query": expression}))
    results: list[dict[str, Any]] = answer["data"]["result"]
    return results


def check_count() -> None:
    """Prometheus scrapes the server and counts exactly the one question."""
    ends = time.monotonic() + WAIT_SECONDS
    while not (found := query(COUNT)):
        if time.monotonic() > ends:
            raise SystemExit(f"Prometheus never read {COUNT}; up: {query('up')}")
        time.sleep(0.5)
    if found[0]["value"][1] != "1":
        raise SystemExit(f"Prometheus counts something else than 1 question: {found}")
    say("Prometheus counts 1 answer")


def check_rules() -> None:
    """The alert rules are loaded and evaluate, and none goes on firing on a server that is well."""
    ends = time.monotonic() + WAIT_SECONDS
    while True:
        groups = call(PROMETHEUS, "/api/v1/rules?type=alert")["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        # That the server was down until it had started is seen until the next evaluation.
        if rules and all(rule["health"] == "ok" and rule["state"] != "firing" for rule in rules):
            break
        if time.monotonic() > ends:
            raise SystemExit(f"the alert rules do not evaluate, or fire: {rules}")
        time.sleep(0.5)
    say(f"Prometheus evaluates {len(rules)} alert rules, none fires")


def check_grafana() -> None:
    """Grafana has the dashboard, and reads Prometheus through its own data source."""
    call(GRAFANA, "/api/dashboards/uid/brainstacks")
    found = call(GRAFANA, "/api/datasources/proxy/uid/prometheus/api/v1/query?" + urlencode({"query": COUNT}))
    if not found["data"]["result"]:
        raise SystemExit(f"Grafana reads nothing from Prometheus: {found}")
    say("Grafana shows the dashboard and reads Prometheus")


ask()
check_count()
check_rules()
if "grafana" in sys.argv[1:]:
    check_grafana()
