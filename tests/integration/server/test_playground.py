"""How the playground's files are served: to everybody, from here alone, under a strict policy."""

import re

from tests.servers import LiveServer


def test_the_page_and_all_that_it_names_come_from_here_and_need_no_key(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        names = [name for name in re.findall(r'(?:src|href)="([^"#]+)"', page.text) if not name.startswith("data:")]
        assert len(names) > 3
        scripts = {name for name in names if name.endswith(".js")}
        unread = set(names)
        while unread:
            name = unread.pop()
            assert name.startswith("playground/"), name  # relative, so that the page works under any path
            asset = client.get(f"/{name}")
            assert asset.status_code == 200, name
            assert not re.search(r"https?://", asset.text), name
            imported = {f"playground/{module}" for module in re.findall(r'from "\./([^"]+)"', asset.text)}
            unread |= imported - scripts
            scripts |= imported
        assert "playground/mix_report.js" in scripts


def test_every_file_of_the_page_forbids_inline_code_other_hosts_and_frames(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        for path in ("/", "/playground/main.js", "/playground/style.css"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"].split("; ")
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
        assert "content-security-policy" not in client.get("/v1/models").headers


def test_the_page_holds_no_inline_code_or_style(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        page = client.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)", page)
    assert not re.search(r"\s(style|on\w+)=", page)


def test_an_unknown_file_is_404_and_nothing_outside_the_folder_is_served(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        assert client.get("/playground/nothing.js").json()["error"]["code"] == "not_found"
        assert client.get("/playground/%2e%2e/config.py").status_code == 404
