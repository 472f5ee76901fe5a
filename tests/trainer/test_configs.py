"""Options of the trainers' configurations: each has one text, which the docstring and `--help` show."""

import inspect
from dataclasses import fields

import pytest

from spec_kd.trainer.configs import DraftConfig, WhiteBoxDistillConfig
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.options import StreamingOptions, TRLDistillationOptions, VLLMOptions

CONFIGS = (
    DraftConfig,
    WhiteBoxDistillConfig,
    OnlineGKDConfig,
    StreamingOptions,
    VLLMOptions,
    TRLDistillationOptions,
)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_each_option_states_what_it_does_and_its_default(config_class):
    documented = " ".join(config_class.__doc__.split())
    own = inspect.get_annotations(config_class)
    for option in fields(config_class):
        text = " ".join(option.metadata["help"].split()) if option.name in own else ""
        assert (f" {option.name} (`" in documented) == (option.name in own), option.name
        assert text in documented, option.name
        if option.name in own and option.default is None:
            assert "default" in text, f"`{option.name}` does not say what `None` means"
        elif option.name in own:
            assert f"defaults to `{option.default!r}`" in documented, option.name
