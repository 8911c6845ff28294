"""Whose key goes to which server, and that neither key nor password is ever shown."""

from __future__ import annotations

import base64

import pytest

from embedwright.endpoint import endpoint, key_variables, shown

KEY = "sk-of-openai"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OWN_KEY", "own-secret\n")


@pytest.mark.parametrize(
    ("url", "home", "sent"),
    [
        ("https://api.openai.com/v1", None, True),
        ("https://API.openai.com:443/v1/", None, True),
        ("http://api.openai.com/v1", None, False),  # in clear
        ("https://api.openai.com.evil.example/v1", None, False),
        ("https://evil.example/api.openai.com/v1", None, False),
        ("https://api.openai.com@evil.example/v1", None, False),
        ("http://127.0.0.1:8000/v1", None, False),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", True),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8000/v1", False),
        ("https://api.openai.com/v1", "http://127.0.0.1:8000/v1", False),
    ],
)
def test_openais_key_goes_to_its_own_host(
    monkeypatch: pytest.MonkeyPatch, url: str, home: str | None, sent: bool
) -> None:
    if home:
        monkeypatch.setenv("OPENAI_BASE_URL", home)
    made = endpoint(url)
    assert (KEY in str(made.client)) == sent and KEY not in repr(made)


def test_a_named_key_goes_to_any_server() -> None:
    made = endpoint("http://127.0.0.1:8000/v1", "OWN_KEY")
    assert made.client["api_key"] == "own-secret" and KEY not in str(made.client)
    assert made.hide("no such key: own-secret!") == "no such key: ***!"
    assert "own-secret" not in repr(made)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("UNSET_KEY", None, r"\$UNSET_KEY, .* not set"),
        ("BAD_KEY", "a\nb", "no key"),
        ("sk-live-123", None, "NAME of the"),
    ],
)
def test_a_variable_without_a_key(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, reason: str) -> None:
    if value:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason) as caught:
        endpoint("http://127.0.0.1:8000/v1", name)
    assert "sk-live" not in str(caught.value) and "a\nb" not in str(caught.value)


def test_a_password_in_the_address_is_sent_and_not_shown() -> None:
    made = endpoint("https://me:p%40ss%2Fword@host.example:8443/v1")
    assert made.url == "https://host.example:8443/v1" == made.client["base_url"]
    basic = base64.b64encode(b"me:p@ss/word").decode()
    assert made.client["default_headers"]["Authorization"] == f"Basic {basic}"
    echoed = made.hide(f"bad login p@ss/word, p%40ss%2Fword, {basic}")
    assert echoed == "bad login ***, ***, ***" and "ss" not in repr(made)
    token = endpoint("https://token-without-a-password@host.example/v1")
    assert token.hide("token-without-a-password") == "***"
    with pytest.raises(ValueError, match="not both"):
        endpoint("https://me:pass@host.example/v1", "OWN_KEY")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/v1?api-version=1",
        "https://host/v1?api_key=secret",
        "https://host/v1#secret",
        "me:secret@host/v1",
        "ftp://me:secret@host/v1",
        "https://me:secret@host:port/v1",
        "https://me:secret@/v1",
        "https://me:secret/more@host/v1",
        "https://me:secret#more@host/v1",
        "https://me:secret://more@host/v1",
        "https://me:secret@more@host:0x1/v1",
        "https://[me:secret@host/v1",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ValueError, match=r"host|v1") as caught:
        endpoint(url)
    assert "secret" not in str(caught.value) + shown(url) and "more" not in str(caught.value)


def test_openais_other_variables_stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: gateway-secret\nauthorization: Bearer custom-secret")
    assert sent_headers("https://api.openai.com/v1") >= {"org-secret", "project-secret", "gateway-secret"}
    assert not [value for value in sent_headers("http://127.0.0.1:8000/v1") if "secret" in value]
    assert "Bearer own-secret" in sent_headers("http://127.0.0.1:8000/v1", "OWN_KEY")


def sent_headers(url: str, key: str | None = None) -> set[str]:
    """The values of the headers of a request, as openai's own client makes it."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(**endpoint(url, key).client)
    options = openai._models.FinalRequestOptions.construct(method="post", url="/embeddings", json_data={})
    return set(client._build_request(client._prepare_options(options)).headers.values())


def test_several_servers_have_a_key_each() -> None:
    one, two, other = "http://a:1/v1#m", "http://a:1/v1#n", "https://me:secret@b/v1#m"
    assert key_variables(["K"], [one, two]) == {one: "K", two: "K"}
    assert key_variables(["b=L", "a:1=K"], [one, two, other]) == {one: "K", two: "K", other: "L"}
    assert key_variables([], [one, other]) == {}
    with pytest.raises(ValueError, match=r"2 servers.*HOST=NAME \(a:1, b\)") as caught:
        key_variables(["K"], [one, other])
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no server has this host; there are a:1"):
        key_variables(["a:2=K"], [one])
    with pytest.raises(ValueError, match="0 servers"):
        key_variables(["K"], [])


def test_a_server_is_no_model_and_its_password_is_not_shown() -> None:
    from embedwright.encoders.open import open_model

    with pytest.raises(ValueError, match=r"http://host/v1 is a server") as caught:
        open_model("http://me:secret@host/v1#model")
    assert "secret" not in str(caught.value)
