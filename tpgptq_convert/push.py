"""Outputs to the Hub: a commit of each degree's, if it was verified and is what it was then.

One degree goes to the branch main, or to one that is named; several go to a branch each, tp-N, and
main gets a card that lists them: servers load a branch (`--revision tp-2`), but no folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from tpgptq_convert.card import degrees_card, placed
from tpgptq_convert.errors import HubError, OutputError, VerificationError
from tpgptq_convert.hub import LOG_IN, explained, line, quietly
from tpgptq_convert.manifest import MANIFEST, listed_files, read_manifest
from tpgptq_convert.progress import Progress, silent
from tpgptq_convert.source import WEIGHT_SUFFIXES, target_outside
from tpgptq_convert.threads import cores, threads
from tpgptq_convert.writer import checksum

CARD, MAIN = "README.md", "main"
Files = Mapping[str, Path | bytes]  # a path, or the content, by the name in the repository


def push(
    out: Path,
    repository: str,
    revision: str | None = None,
    private: bool = False,
    progress: Progress = silent,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """Push OUT, and return each branch's name, commit and address, and whether it was changed, in
    the order of the commits.

    What is there already is not sent again, so an upload that was cut short goes on. Raises
    OutputError, VerificationError or HubError.
    """
    directories = degrees(out)
    branches = {name or revision or MAIN: directory for name, directory in directories.items()}
    manifests = {name: read_manifest(directory) for name, directory in branches.items()}
    for name, directory in branches.items():
        _check_output(directory, manifests[name], progress)
    targets: dict[str, Files] = {
        name: {file: directory / file for file in (*listed_files(manifests[name]), MANIFEST)}
        | {CARD: placed((directory / CARD).read_bytes(), _where(repository, name))}
        for name, directory in branches.items()
    }
    if None not in directories:
        card = degrees_card(manifests, branches, repository)
        targets[MAIN] = {CARD: card.encode()}
    check_target(repository, list(targets))
    api = HfApi()
    with _uploading(out, repository), explained(repository), quietly(quiet):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and api.model_info(repository).private is False:
            raise HubError(
                f"{repository}: exists, and is public; must be private, as --private says",
                hint="make it private on the Hub, or leave --private out",
            )
        return [_commit(api, repository, name, files) for name, files in targets.items()]


def check_target(repository: str, branches: list[str]) -> None:
    """Raise HubError or OutputError where a push can't succeed, before anything is changed."""
    if "/" not in repository:  # the library would make it, under the token's owner, and not find it
        raise HubError(
            f"{repository}: names no owner; must be like org/name",
            hint=f"to push to your own, name yourself: NAME/{repository}",
        )
    if not get_token():
        raise HubError(
            f"{repository}: can't be pushed to without a token; must be open to yours", hint=LOG_IN
        )
    api = HfApi()
    for branch in branches:
        with explained(repository), suppress(RepositoryNotFoundError):  # it will be made
            try:
                _standing(api, repository, branch)
            except RevisionNotFoundError:  # it will be made, from main
                _standing(api, repository, MAIN)


def degrees(out: Path) -> dict[str | None, Path]:
    """The directories of an output by the branches that they go to; None: one that isn't theirs."""
    if (out / MANIFEST).is_file():
        return {None: out}
    found = sorted(
        (path.parent for path in out.glob(f"tp-*/{MANIFEST}")),
        key=lambda path: (len(path.name), path.name),
    )
    if not found:
        raise OutputError(
            f"{out}: has no {MANIFEST}, nor a tp-N with one; must be an output of `tpgptq convert`",
            hint=f"make it: tpgptq convert --tp N MODEL {out}",
        )
    return {path.name: path for path in found}


def _check_output(directory: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
    """Refuse an output that wasn't verified, or isn't what it was then."""
    if manifest.get("verified") is not True:
        raise OutputError(
            f"{directory}: was not verified; must be, before it is pushed",
            hint=f"tpgptq verify {manifest['source'].get('name')} {directory}",
        )
    listed = listed_files(manifest)
    files = [name for name in (*listed, CARD) if not (directory / name).is_file()]
    problems = [f"{directory / name}: missing" for name in files]
    if target := target_outside(directory, Path(CARD)):  # the one file of unknown content
        problems.append(f"{directory / CARD}: a link to {target}; must lie in the output itself")
    total = sum(info.get("bytes", 0) for info in listed.values())
    with progress("Checking", total) as advance, threads(cores()) as pool:
        present = [name for name in listed if name not in files]
        for name, found in zip(
            present, pool.map(checksum, (directory / name for name in present)), strict=True
        ):
            advance(found["bytes"])
            if found != listed[name]:
                problems.append(f"{directory / name}: is not what it was when it was verified")
    if problems:
        raise VerificationError(*problems, hint="convert again, or restore the files")


def _standing(api: HfApi, repository: str, branch: str) -> tuple[str, set[str]]:
    """The commit that a branch is at, and the files in it that are of an earlier output.

    Raises OutputError where it holds another model.
    """
    info = api.model_info(repository, revision=branch)
    assert info.sha is not None
    present = {file.rfilename for file in info.siblings or ()}
    earlier: set[str] = set()
    if MANIFEST in present:
        path = hf_hub_download(repository, MANIFEST, revision=info.sha)
        earlier = {*listed_files(read_manifest(Path(path).parent)), MANIFEST, CARD} & present
    others = [name for name in sorted(present - earlier) if name.endswith(WEIGHT_SUFFIXES)]
    if others:
        raise OutputError(
            f"{repository}: its branch {branch} holds {others[0]}, which is no part of an output "
            "of this tool; must be empty, or hold an earlier output",
            hint="name another repository, or another branch",
        )
    return info.sha, earlier


def _where(repository: str, branch: str) -> str:
    """How a command that loads a branch names it."""
    return repository if branch == MAIN else f"{repository} --revision {branch}"


def _commit(api: HfApi, repository: str, branch: str, files: Files) -> dict[str, Any]:
    """Make these files a branch's, in one commit, in the place of an earlier output's."""
    if branch != MAIN:
        api.create_branch(repository, branch=branch, exist_ok=True)
    head, earlier = _standing(api, repository, branch)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, content) for name, content in files.items()),
        *(CommitOperationDelete(name) for name in sorted(earlier - files.keys())),
    ]
    with _unlogged():
        commit = api.create_commit(
            repository,
            operations,
            commit_message=f"Written by tpgptq-convert: {branch}",
            revision=branch,
            parent_commit=head,
        )
    address = f"{api.endpoint}/{repository}/tree/{branch}"
    changed = commit.oid != head
    return {"branch": branch, "commit": commit.oid, "url": address, "changed": changed}


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without the library's own words on a commit that would change nothing."""
    log = logging.getLogger(HfApi.__module__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _uploading(out: Path, repository: str) -> Iterator[None]:
    """Around an upload: what the library says of it that is no answer of the Hub's."""
    try:
        yield
    except RuntimeError as error:
        raise HubError(
            f"{repository}: the upload was cut short ({line(error.__cause__ or error)})",
            hint=f"tpgptq push {out} {repository} goes on; what is there is not sent again",
        ) from None
