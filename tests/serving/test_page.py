"""The chat page: its files are there without a key, refer to nothing elsewhere, and to elements that exist."""

import re
import shutil
import subprocess

import pytest

from jaxllm.serving.routes.page import FILES, FOLDER
from tests.serving.harness import running, scripted


def test_the_page_needs_no_key_and_the_api_does(model):
    with running(scripted(model, []), api_key=["secret"]) as server:
        page = server.http.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        referred = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert {name.removeprefix("static/") for name in referred} == FILES - {"index.html"}
        kinds = {".js": "javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        for name in referred:
            answer = server.http.get(f"/{name}")
            assert answer.status_code == 200 and kinds["." + name.split(".")[-1]] in answer.headers["content-type"]
        for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/none", "/static/", "/v1/models"):
            assert server.http.get(path).status_code == 401


def test_nothing_is_fetched_from_elsewhere():
    for name in FILES:
        text = (FOLDER / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r"https?:|[\"'(]//", text), name
        assert "innerHTML" not in text and "eval(" not in text


def test_the_script_uses_elements_that_are_there():
    page, script = (FOLDER / "index.html").read_text(), (FOLDER / "app.js").read_text()
    ids, names = set(re.findall(r'id="([\w-]+)"', page)), set(re.findall(r'name="(\w+)"', page))
    assert set(re.findall(r'element\("([\w-]+)"\)', script)) <= ids
    used = set(re.findall(r"settings\.elements\.(\w+)", script))
    (numbers,) = re.findall(r"NUMBERS = \[(.*?)\]", script)
    assert used | set(re.findall(r'"(\w+)"', numbers)) == names - {"viewport"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to parse JavaScript")
def test_the_script_parses():
    done = subprocess.run(["node", "--input-type=module", "--check"], input=(FOLDER / "app.js").read_text(), text=True)
    assert done.returncode == 0
