import pytest

from spec_kd.secrets import find_secrets, hide_secrets, is_secret_name, strip_secrets

PASSWORD = "correct-horse-battery"


@pytest.mark.parametrize(
    "name", ["token", "hub_token", "HF_TOKEN", "api_key", "apiKey", "X-Api-Key", "Authorization", "client_secret",
             "aws_secret_access_key", "use_auth_token", "db_password"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert strip_secrets({name: PASSWORD, "dtype": "float16"}) == {name: "[hidden]", "dtype": "float16"}
    assert strip_secrets({"options": [{name: PASSWORD}]}, None) == {"options": [{}]}
    assert find_secrets({"options": [{name: f"Bearer {PASSWORD}"}]}) == {PASSWORD, f"Bearer {PASSWORD}"}


@pytest.mark.parametrize(
    "name", ["eos_token", "image_token", "max_new_tokens", "token_selection", "api_key_env", "eos_token_ids",
             "include_tokens_per_second", "tokenizer", "assistant_token", "return_token_ids"],
)  # fmt: skip
def test_names_of_text_and_models_are_no_secrets(name):
    assert strip_secrets({name: "value", "more": [1, None, True]}) == {name: "value", "more": [1, None, True]}


def test_a_flag_is_no_secret():
    assert strip_secrets({"token": True, "use_auth_token": None}) == {"token": True, "use_auth_token": None}


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{PASSWORD}@host/v1 does not answer",
        f"https://{PASSWORD}@host/v1 does not answer",
        f'`engine_kwargs` is \'{{"token": "{PASSWORD}", oops\', which is no JSON',
        f"unexpected {{'dtype': 'float16', 'api_key': '{PASSWORD}'}}",
        f"GET /v1/models?api_key={PASSWORD}&n=1",
        f"headers: Authorization: Bearer {PASSWORD}",
        f"model_init_kwargs={{token: {PASSWORD}}}",
    ],
)
def test_secrets_are_found_in_text_by_what_stands_before_them(text):
    hidden = hide_secrets(text)
    assert PASSWORD not in hidden and "[hidden]" in hidden
    assert hide_secrets(hidden) == hidden
    assert hidden.split("[hidden]")[0] == text.split(PASSWORD)[0].replace("me:", "")


def test_secrets_are_found_by_their_form_and_by_the_options():
    for token in ("hf_" + "a1B2" * 8, "sk-" + "x" * 20, "ghp_" + "0" * 36):
        assert token not in hide_secrets(f"the value {token!r} is wrong")
    options = {"base_url": "https://me:p%20w-d%21@host/v1", "engine_kwargs": {"token": PASSWORD}}
    assert hide_secrets(f"{PASSWORD}, p%20w-d%21 and p w-d!", options) == "[hidden], [hidden] and [hidden]"
    assert strip_secrets(options)["base_url"] == "https://[hidden]@host/v1"


def test_other_text_stays():
    text = "eos_token: '<|im_end|>', 4 tokens: a, b; see https://host/v1?page=2 and mail a@b.org; the token is wrong"
    assert hide_secrets(text) == text


def test_no_text_makes_it_slow():
    for text in ("token=" * 50_000, "http://" + "a" * 300_000, "Bearer " * 50_000, "-" * 300_000, "sk-" * 100_000):
        hide_secrets(text)
