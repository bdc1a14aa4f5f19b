"""Weight files from the Hugging Face hub, or what to do when they cannot be had."""

from __future__ import annotations

from pathlib import Path

from extract.encoders.table import EncoderError, EncoderSpec
from extract.encoders.weights import first_sentence

HUB_TIMEOUT_S = 10.0


def fetch_from_hub(
    spec: EncoderSpec, revision: str | None = None, *, together: tuple[str, ...] = ()
) -> tuple[Path, str]:
    """The weights file of `spec` from the Hugging Face hub or its local cache, and the commit it is of.

    together: files that have to lie in one folder where there is no network; the last is the weights.

    A short probe goes first, because `hf_hub_download` retries for minutes when there is no network.

    Raises:
        EncoderError: what to download, where to put it and which option to set.
    """
    from huggingface_hub.errors import HfHubHTTPError

    if spec.elsewhere:
        raise EncoderError(
            f"encoder {spec.name!r}: its weights are not on the hub. Get {spec.elsewhere} (licence: {spec.licence}) "
            "and set encoder.weights=/path/to/it"
        )
    if not spec.hub_repo:
        raise EncoderError(
            f"{spec.name}: timm publishes no weights for it. Set encoder.weights=FILE, choose a tagged name "
            "(timm:NAME.TAG), or encoder.random_weights=true for a test"
        )
    try:
        return _from_hub(spec, revision)
    # HfHubHTTPError's bases hold the root of the hub's HTTP library, whichever its version uses: requests or httpx
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]  # bases are known when it runs
        cached = _from_hub_cache(spec, revision)
        if cached is None:
            raise EncoderError(_how_to_get(spec, revision, error, together)) from None
        return cached


def _from_hub(spec: EncoderSpec, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for file_name in spec.hub_files:
        try:
            get_hf_file_metadata(hf_hub_url(spec.hub_repo, file_name, revision=revision), timeout=HUB_TIMEOUT_S)
        except EntryNotFoundError:
            continue
        path = Path(hf_hub_download(spec.hub_repo, file_name, revision=revision))
        return path, path.parent.name  # .../snapshots/<commit>/<file>
    raise FileNotFoundError(f"none of {', '.join(spec.hub_files)} is there")


def _from_hub_cache(spec: EncoderSpec, revision: str | None) -> tuple[Path, str] | None:
    from huggingface_hub import try_to_load_from_cache

    for file_name in spec.hub_files:
        found = try_to_load_from_cache(spec.hub_repo, file_name, revision=revision)
        if isinstance(found, str):
            return Path(found), Path(found).parent.name
    return None


def _how_to_get(spec: EncoderSpec, revision: str | None, error: BaseException, together: tuple[str, ...]) -> str:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    page = f"https://huggingface.co/{spec.hub_repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"encoder.revision={revision}: {spec.hub_repo} has no such revision; see {page}/commits/main"
    at = f" at revision {revision}" if revision else ""
    gate = (
        f"It is gated: accept its licence ({spec.licence}) on that page with your account, then set HF_TOKEN or run "
        "`hf auth login`. "
        if spec.gated or isinstance(error, GatedRepoError)
        else ""
    )
    files, where = (" and ".join(together), "them into one folder") if together else (" or ".join(spec.hub_files), "")
    return (
        f"encoder {spec.name!r}: no weights in the local hub cache, and {spec.hub_repo} could not be reached or read. "
        f"{gate}Either connect and run again, or download {files} from {page}{at} on another machine, put "
        f"{where or 'it anywhere'} here and set encoder.weights=/path/to/{(together or spec.hub_files[:1])[-1]} "
        f"({type(error).__name__}: {first_sentence(error)})"
    )
