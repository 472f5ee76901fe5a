import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.prompts.filters import NGRAM, TextFilter, detect_language, list_user_texts, measure_repetition


def find_fault(text, num_tokens=10, **options):
    return TextFilter(**options).find_fault(text, num_tokens)


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "As an AI researcher, I have to review ten papers. Can you help me?",
        "I'm sorry to bother you again, but I still can not log in.",
        "I'm sorry but I will need two rooms.",
        "Sure, that is what I meant. Could you book it?",
        "Here are the data for the destinations:\n- DEST1, rating 4.5\n- DEST2, rating 4.3",
        "Of course I know Python, but how do decorators work?",
        "Say hello, hello, hello to my cat.",
        "你好，请问什么是黑洞？",
        "好的，那帮我查一下明天的天气。",
        "Fill in the blank: Flukes are in class _________.",
        "天气",
        'My log says {"api": "createEvent", "parameters": {"event": "fair"}}: what is wrong?',
    ],
)
def test_what_users_write_passes(text):
    assert find_fault(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("What is \ufffd\ufffd?", "broken_characters"),
        ("I'm sorry, but I can't assist with that request.", "refusal"),
        ("I am very sorry, but as an AI I am not able to do that.", "refusal"),
        ("I cannot provide medical advice.", "refusal"),
        ("很抱歉，我无法回答这个问题。", "refusal"),
        ("As an AI language model, I don't have feelings.", "assistant_like"),
        ("Hello! How can I assist you today?", "assistant_like"),
        ("Certainly! Here is a poem about kites.", "assistant_like"),
        ("I'd be happy to help you with that.", "assistant_like"),
        ('[{"name": "get_weather", "arguments": {"city": "Berlin"}}]', "assistant_like"),
        ("作为一个人工智能语言模型，我没有感情。", "assistant_like"),
        ("你好！请问有什么可以帮您？", "assistant_like"),
        ("the end of the end of the end of the end of the end of the", "repetitive"),
        ("我要买书我要买书我要买书我要买书我要买书", "repetitive"),
    ],
)
def test_what_users_do_not_write_is_named(text, reason):
    assert find_fault(text) == reason


def test_lengths_are_inclusive_and_in_tokens():
    assert [find_fault("a b c", n, min_tokens=3, max_tokens=5) for n in (2, 3, 5, 6)] == [
        "too_short", None, None, "too_long",
    ]  # fmt: skip


def test_languages_are_asked_for_only_where_they_are_limited(monkeypatch):
    assert find_fault("Wie wird das Wetter morgen?", languages=("de", "en")) is None
    assert find_fault("Wie wird das Wetter morgen?", languages=("en",)) == "language"
    assert find_fault("12345 67890", languages=("en",)) == "language"
    monkeypatch.setattr("spec_kd.prompts.filters.detect_language", lambda text: pytest.fail("asked"))
    assert find_fault("Wie wird das Wetter morgen?") is None


@given(st.lists(st.sampled_from("abc"), min_size=0, max_size=40))
def test_repetition_is_the_share_of_ngrams_seen_before(words):
    seen, repeated = set(), 0
    count = max(0, len(words) - NGRAM + 1)
    for start in range(count):
        ngram = " ".join(words[start : start + NGRAM])
        repeated += ngram in seen
        seen.add(ngram)
    expected = repeated / count if count >= 8 else 0.0
    assert measure_repetition(" ".join(words).upper()) == pytest.approx(expected)


def test_chinese_is_counted_by_character():
    assert measure_repetition("天地玄黄" * 4) == pytest.approx(9 / 13)  # 13 windows, of which 4 are distinct


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": -1}, "`min_tokens` is -1, but must be at least 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "`max_tokens=4` leaves nothing above `min_tokens=5`"),
        ({"max_repetition": 0.0}, "is 0.0, but must be above 0 and at most 1"),
        ({"languages": "en"}, r"list of codes such as \['en', 'zh'\], got 'en'"),
        ({"languages": ()}, "list of codes"),
    ],
)
def test_limits_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextFilter(**options)


def test_user_texts_of_prompts():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "First  One"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "second"},
    ]
    assert list_user_texts(messages) == ["first one", "second"]
    assert list_user_texts("Just TEXT") == ["just text"]


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
