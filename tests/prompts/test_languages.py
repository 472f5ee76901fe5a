import pytest

from spec_kd.prompts.languages import detect_language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "en"),
        ("法国的首都是哪里？", "zh"),
        ("Wie wird das Wetter morgen in Berlin?", "de"),
        ("¿Cuál es la capital de Francia?", "es"),
        ("今日の東京の天気を教えてください", "ja"),
        ("Какая сегодня погода в Москве?", "ru"),
        ("Explain\nthis\n\nsentence in simple words.", "en"),
        ("WHAT IS THE BOILING POINT OF WATER", "en"),
    ],
)
def test_languages(text, language):
    assert detect_language(text) == language


@pytest.mark.parametrize("text", ["", "  ", "12 + 30 = ?", "\N{GRINNING FACE}\N{GRINNING FACE}", '{"1": [2, 3]}'])
def test_a_text_without_letters_has_no_language(text):
    assert detect_language(text) == "und"


def test_a_text_that_is_likely_of_no_language_has_none():
    assert detect_language("Book a table") == "und"  # fastText: Kannada, with 5 %


def test_long_texts_are_judged_by_their_beginning():
    assert detect_language("What is the capital of France? " * 20 + "法国的首都是哪里？" * 2000) == "en"
