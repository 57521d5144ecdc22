"""What an error of the hub means, in words: what happened, by its first cause, and what to do about it."""

import json
import os
import re

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import httpx

from .errors import RunError, reason_of

INSTEAD = {
    "model": "a local folder, a .gguf file or 'smollm2'", "dataset": "a local file or 'pydoc'",
    "task": "a task of your own on local files",
}  # fmt: skip


class HubError(RunError):
    """`what` happened when the hub was asked, and a remedy."""

    def __init__(self, label: str, what: str, remedy: str):
        super().__init__(f"{label}: {what}; {remedy}" if remedy else f"{label}: {what}")
        self.what = what


def endpoint() -> str:
    """The hub's address, as the environment says now and not when huggingface_hub was imported."""
    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def explain(error: BaseException, name: str, kind: str = "model") -> tuple[str, str]:
    """What an error of huggingface_hub says happened, by its first cause, and what to do about it."""
    return explain_hub_error(error, name, kind) or (f"cannot be fetched: {reason_of(error)}", "")


def explain_hub_error(error: BaseException, name: str, kind: str) -> tuple[str, str] | None:
    """As `explain`; nothing where what failed was not the hub."""
    cause = error
    while cause is not None:
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(cause, name, kind)
        if isinstance(cause, httpx.TransportError):
            return _failed(cause, kind)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            instead = f"it is not in the cache; unset that once, or, offline, give {INSTEAD[kind]}"
            return "HF_HUB_OFFLINE is set", instead
        if isinstance(cause, (json.JSONDecodeError, errors.FileMetadataError)):
            return f"{endpoint()} does not answer as the hub does", "is it a login page, or HF_ENDPOINT wrong?"
        if isinstance(cause, errors.HFValidationError):
            return f"cannot be a name on the hub ({reason_of(cause)})", ""
        cause = cause.__cause__ or cause.__context__
    return None


def _refused(error: errors.HfHubHTTPError, name: str, kind: str) -> tuple[str, str]:
    """Of an answer that says no."""
    response, token = error.response, huggingface_hub.get_token() is not None
    said = " ".join((error.server_message or "").split())
    answer = f"{response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")
    page = f"{endpoint()}/{name}" if kind == "model" else f"{endpoint()}/datasets/{name}"
    login = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        if token:
            return f"gated, and closed to this token's account ({answer})", f"ask for access at {page}"
        return f"gated ({answer})", f"accept its terms at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "check the name" if token else f"check the name; if it is private, {login}"
        return f"the hub shows no {'model' if kind == 'model' else 'data set'} of this name ({answer})", remedy
    if response.status_code == 401:
        return f"the hub refuses the token ({answer})", "renew HF_TOKEN, or run `hf auth login`"
    if response.status_code == 429:
        wait = wait_asked_for(response)
        limit = "" if token else f", or {login} for a higher limit"
        return f"the hub was asked too often ({answer})", f"wait {f'{wait:.0f} s' if wait else 'some minutes'}{limit}"
    url = response.url.copy_with(query=None)
    if response.status_code >= 500:
        return f"the hub fails at {url} ({answer})", "try again later"
    return f"the hub refuses {url} ({answer})", ""


def _failed(error: httpx.TransportError, kind: str) -> tuple[str, str]:
    """Of a request that got no answer, or not all of it."""
    said, url = reason_of(error), error.request.url
    host = f"{url.scheme}://{url.netloc.decode()}"
    if isinstance(error, httpx.ProxyError):
        return f"the proxy to {host} fails ({said})", "check HTTPS_PROXY and NO_PROXY"
    if isinstance(error, httpx.UnsupportedProtocol):
        return f"HF_ENDPOINT {endpoint()} is no address ({said})", "it begins with https://"
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        if "CERTIFICATE" in said:
            return f"the certificate of {host} is not accepted ({said})", "check the proxy, or SSL_CERT_FILE"
        if host != endpoint():
            return f"{host}, where the hub keeps its files, cannot be reached ({said})", "does a firewall keep it out?"
        return f"{host} cannot be reached ({said})", f"it is not in the cache; offline, give {INSTEAD[kind]}"
    if isinstance(error, httpx.TimeoutException):
        return f"{host} does not answer ({said})", "try again later"
    return f"{host} cut the connection ({said})", "try again"


def wait_asked_for(response: httpx.Response) -> float:
    """Seconds after which a server that is asked too often wants to be asked again; 0 where it names none."""
    told = response.headers.get("retry-after", "")
    if found := re.search(r"\bt=(\d+)", response.headers.get("ratelimit", "")):
        told = found[1]
    return float(told) if told.isdigit() else 0.0
