"""Composes configs as a command line does."""

import re

from hydra import compose, initialize_config_module

from qk_sniffer.config import Config, from_omegaconf


def composed(*arguments: str) -> Config:
    with initialize_config_module("qk_sniffer.conf", version_base="1.3"):
        return from_omegaconf(compose("config", list(arguments)))


def choice(slug: str) -> str:
    return "model=" + re.sub(r"[-.]", "_", slug)
