"""A small model of pictures with random weights, made of the small Llama: `python tiny_vision.py LLAMA FOLDER`.

An Idefics3 of which a picture is 16 tokens. Of FOLDER also comes `pictures/`, and `path/`: a PYTHONPATH without the
packages that were built for another torch, and fail when they are imported. It runs in the interpreter of an image.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

_WITHOUT = """\
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {broken!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
_PICTURE = "<image>"
_SPECIAL = [_PICTURE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_TEMPLATE = (
    "{% for message in messages %}<|role|>{{ message['role'] }}<|said|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|said|>{% endif %}"
)


def describe(llama: Path, folder: Path) -> None:
    def read(name: str) -> Any:
        return json.loads((llama / name).read_text(encoding="utf-8"))

    text, tokenizer, settings = (read(f"{name}.json") for name in ("config", "tokenizer", "tokenizer_config"))
    ids = tokenizer["model"]["vocab"]
    for token in [*_SPECIAL, *_TILES]:
        ids[token] = len(ids)
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": ids[token], "content": token, "special": True, **plain})
    text["vocab_size"] = len(ids)
    side = {"longest_edge": 112}
    files = {
        "config": {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "dtype": "bfloat16",
            "image_token_id": ids[_PICTURE],
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "bos_token_id": text["bos_token_id"],
            "eos_token_id": text["eos_token_id"],
            "pad_token_id": text["eos_token_id"],
            "text_config": text,
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 112,
                "patch_size": 14,
            },
        },
        "generation_config": read("generation_config.json"),
        "tokenizer": tokenizer,
        "tokenizer_config": settings | {"processor_class": "Idefics3Processor", "chat_template": _TEMPLATE},
        "processor_config": {"processor_class": "Idefics3Processor", "image_seq_len": 16},
        "preprocessor_config": {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_image_splitting": False,
            "size": side,
            "max_image_size": side,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def paint(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    Image.new("RGB", (224, 224), (200, 30, 30)).save(folder / "red.png")
    Image.new("RGB", (120, 64), (0, 30, 200)).save(folder / "blue one.jpg")
    Image.linear_gradient("L").resize((90, 300)).convert("RGBA").save(folder / "grey.webp")
    (folder / "torn.png").write_bytes((folder / "red.png").read_bytes()[:60])


def without_what_is_broken(folder: Path) -> None:
    broken = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            importlib.import_module(name)
        except Exception:
            broken.append(name)
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_WITHOUT.format(broken=broken), encoding="utf-8")


if __name__ == "__main__":
    llama, folder = map(Path, sys.argv[1:])
    describe(llama, folder)
    paint(folder / "pictures")
    without_what_is_broken(folder / "path")
