"""Answers the config keys and the flag of the original qk-sniffer with their present names."""

MOVED = {
    "capture.sampler": "sampler",
    "capture.sampler.type": "sampler.type",
    "capture.sampler.base_rate": "sampler.base_rate",
    "capture.sampler.seed": "sampler.seed",
    "capture.sampler.bucket_size": "sampler.min_bucket_size",
    "capture.sampler.min_bucket_size": "sampler.min_bucket_size",
    "capture.bucket_size": "sampler.min_bucket_size",
    "capture.min_bucket_size": "sampler.min_bucket_size",
    "capture.queue_size": "inference.queue_mb, in megabytes",
    "capture.write_batch_size": "inference.segment_mb, in megabytes",
    "tokenizer": "model.tokenizer",
    "tokenizer.name": "model.tokenizer.name",
    "tokenizer.revision": "model.tokenizer.revision",
    "tokenizer.max_length": "model.tokenizer.max_length",
    "tokenizer.add_special_tokens": "model.tokenizer.add_special_tokens",
    "inference.autocast_dtype": "model.dtype",
    "inference.device": "model.device_map",
    "inference.device_map": "model.device_map",
    "inference.dtype": "model.dtype",
    "model.torch_dtype": "model.dtype",
}

GONE = {
    "tokenizer.padding": "texts of a batch are always padded on the right, which changes no vector",
    "tokenizer.padding_side": "texts of a batch are always padded on the right, which changes no vector",
    "tokenizer.truncation": "texts are always cut at model.tokenizer.max_length",
    "output.readme_path": "the card is always README.md in output.data_root",
}

CONFIG_FLAG = (
    "--config is a flag of the original tool, which read whole config files. Now choose model=..., dataset=..., "
    "sampler=..., output=... (or +experiment=...) and change settings by key=value; a key of the old file is answered "
    "with its new name. Put files of your own into groups: with --config-dir FOLDER, FOLDER/model/mine.yaml is "
    "model=mine"
)


def answer(key: str) -> str | None:
    """Returns the answer to a key of the original tool; None for any other key."""
    if key in GONE:
        return f"{key} is a key of the original tool that no longer exists: {GONE[key]}"
    if key in MOVED:
        return f"{key} is a key of the original tool; it is now {MOVED[key]}"
    return None
