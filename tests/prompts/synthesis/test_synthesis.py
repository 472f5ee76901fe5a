"""Synthetic queries of which it is known what they must be, from a scripted engine."""

import json
import re
from collections import Counter

import pytest
from datasets import Dataset
from scripted_engine import ANSWER, TOOLS, USER_TURN, WORDS, ScriptedEngine, drawn, get_queries, listed, synthesize

from spec_kd.data.responses import generate_responses
from spec_kd.engines import Completion, UnsupportedByEngineError, UnusablePromptError
from spec_kd.engines.server.logprobs import UnidentifiedTokensError
from spec_kd.prompts.filters import TextFilter


def test_what_is_dropped_is_reported_with_the_reason(caplog):
    test_set = [[{"role": "user", "content": "Which river is the longest one?"}], "An unrelated text."]
    queries = [
        "How tall is a giraffe?",
        "",
        "Hm",
        "I'm sorry, but I cannot help with that.",
        "Certainly! Here is a poem.",
        "the end of the end of the end of the end of the end of",
        "Wie hoch ist der Eiffelturm in Paris?",
        "How  tall is a GIRAFFE?",
        "which river is the longest one?",
        "x" * 60,
        "a<|system|>b",
        "When was paper invented?",
    ]
    result = synthesize(
        listed(queries), 12, max_asked=12, max_new_tokens=60, test_set=[test_set[0]],
        text_filter=TextFilter(min_tokens=4, languages=("en",)),
    )  # fmt: skip
    assert get_queries(result) == ["How tall is a giraffe?", "When was paper invented?"]
    report = result.report
    assert report.dropped == {
        "empty": 1, "too_short": 1, "refusal": 1, "assistant_like": 1, "repetitive": 1, "language": 1,
        "near_duplicate": 1, "test_overlap": 1, "unfinished": 1, "special_tokens": 1,
    }  # fmt: skip
    assert (report.num_queries, report.asked, report.kept, report.surplus, report.rounds) == (12, 12, 2, 0, 1)
    assert not report.is_complete and report.share_good == pytest.approx(1 / 6)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "2 of 12 queries were kept of 12 asked for" in caplog.text


def test_the_target_is_asked_again_until_there_are_enough():
    """Every third query is good; by the yield so far, so many are asked for as will do."""
    queries = [f"{WORDS[i % 17]} or {WORDS[i // 17]} number {i}?" if i % 3 == 0 else "" for i in range(200)]
    engine = ScriptedEngine(listed(queries))
    result = synthesize(engine, 30, near_duplicate_threshold=None)
    assert get_queries(result) == [q for q in queries if q][:30]
    # 30 asked give 10, the 20 missing need 60, which give 20.
    assert [len(texts) for texts, _ in engine.calls] == [30, 60]
    assert (result.report.asked, result.report.kept, result.report.rounds) == (90, 30, 2)
    assert result.report.dropped == {"empty": 60} and result.report.is_complete


def test_more_than_wanted_is_surplus_and_rounds_are_bounded():
    queries = [""] * 10 + [f"A question about {word} things?" for word in WORDS]
    engine = ScriptedEngine(listed(queries))
    result = synthesize(engine, 2, round_size=10, max_asked=25, near_duplicate_threshold=None)
    # Without any yield a tenth is assumed: 20 for 2, where 10 are allowed.
    assert [len(texts) for texts, _ in engine.calls] == [2, 10]
    assert result.report.dropped == {"empty": 10} and result.report.kept == 2 and result.report.surplus == 0
    engine = ScriptedEngine(listed(["", "", *(f"A question about {i} things?" for i in range(20))]))
    report = synthesize(engine, 2, max_asked=30, near_duplicate_threshold=None).report
    assert (report.asked, report.kept, report.surplus) == (22, 2, 18)


def test_rows_are_prompts_that_responses_are_generated_for():
    engine = ScriptedEngine(drawn)
    result = synthesize(engine, 4)
    assert result.dataset.column_names == ["prompt", "tools", "scenario", "source", "conversation_id"]
    assert set(result.dataset["scenario"]) == {"synthetic"} and set(result.dataset["source"]) == {"some/target"}
    assert len(set(result.dataset["conversation_id"])) == 4 and set(result.dataset["tools"]) == {None}
    assert all([m["role"] for m in row["prompt"]] == ["user"] for row in result.dataset)
    answered = generate_responses(engine, result.dataset, processing_class=engine.tokenizer, show_progress=False)
    assert engine.tokenizer.decode(answered[0]["prompt_ids"]) == f"<|user|>{get_queries(result)[0]}<|end|><|assistant|>"


def test_the_target_sees_the_template_up_to_the_users_turn():
    engine = ScriptedEngine(drawn)
    prompts = ["About birds.", "About stones."]
    result = synthesize(engine, 40, system_prompts=prompts, near_duplicate_threshold=None)
    seen = Counter(text for texts, _ in engine.calls for text in texts)
    assert set(seen) == {f"<|system|>{prompt}<|end|><|user|>" for prompt in prompts}
    assert min(seen.values()) > 10  # both are drawn
    assert all(len(row["prompt"]) == 1 for row in result.dataset)  # steering only
    kept = synthesize(drawn, 6, system_prompts="About birds.", keep_system_prompt=True).dataset
    assert all(row["prompt"][0] == {"role": "system", "content": "About birds."} for row in kept)


def test_tools_are_drawn_shown_and_kept():
    engine = ScriptedEngine(drawn)
    result = synthesize(engine, 30, tool_catalog=TOOLS, num_tools=[1, 3], near_duplicate_threshold=None)
    drawn_tools = [json.loads(tools) for tools in result.dataset["tools"]]
    assert {len(tools) for tools in drawn_tools} == {1, 3}
    names = [tuple(tool["function"]["name"] for tool in tools) for tools in drawn_tools]
    assert all(len(set(chosen)) == len(chosen) for chosen in names) and len(set(names)) > 8
    # What the user's turn was written under is what the target will see with the row.
    tokenizer = engine.tokenizer
    seen = Counter(text for texts, _ in engine.calls for text in texts)
    rows = Counter()
    for row, tools in zip(result.dataset, drawn_tools, strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], tools=tools, tokenize=False)
        rows[text[: text.index(USER_TURN) + len(USER_TURN)]] += 1
    assert rows == seen
    again = synthesize(drawn, 30, tool_catalog=TOOLS, num_tools=[1, 3], near_duplicate_threshold=None)
    assert again.dataset.to_list() == result.dataset.to_list()
    other = synthesize(drawn, 30, tool_catalog=TOOLS, num_tools=[1, 3], near_duplicate_threshold=None, seed=1)
    assert other.dataset["tools"][:] != result.dataset["tools"][:]


def test_tools_can_stand_in_the_system_prompt():
    engine = ScriptedEngine(drawn)
    result = synthesize(
        engine, 5, tool_catalog=TOOLS, num_tools=2, system_prompts="You have {tools}.", keep_system_prompt=True
    )
    for row in result.dataset:
        found = re.fullmatch(r"You have (.*)\.", row["prompt"][0]["content"])
        assert len(json.loads(found[1])) == 2 and row["tools"] is None
        assert f"<|system|>{found[0]}<|end|><|user|>" in {text for texts, _ in engine.calls for text in texts}


def test_conversations_of_several_turns_are_written_by_both_sides():
    engine = ScriptedEngine(drawn)
    result = synthesize(engine, 12, num_turns=[1, 3], system_prompts="Steer.", tool_catalog=TOOLS, num_tools=1)
    lengths = Counter(len(row["prompt"]) for row in result.dataset)
    assert set(lengths) == {1, 5}
    by_text = {text for texts, _ in engine.calls for text in texts}
    for row in result.dataset:
        assert [m["role"] for m in row["prompt"]] == ["user", "assistant"] * (len(row["prompt"]) // 2) + ["user"]
        tools = json.loads(row["tools"])
        for end in range(1, len(row["prompt"]) + 1):
            before = row["prompt"][: end - 1]
            if row["prompt"][end - 1]["role"] == "user":  # written under the steering prompt
                system = [{"role": "system", "content": "Steer."}]
                text = engine.tokenizer.apply_chat_template(system + before, tools=tools, tokenize=False) + USER_TURN
            else:  # answered as it will be
                text = engine.tokenizer.apply_chat_template(
                    before, tools=tools, tokenize=False, add_generation_prompt=True
                )
            assert text in by_text
    assert {o.temperature for texts, o in engine.calls if texts[0].endswith(ANSWER)} == {0.0}


def test_a_conversation_with_a_bad_turn_is_dropped_as_a_whole():
    def write(prompt, seed):
        if prompt.endswith(ANSWER):
            return {"a": "Yes.<|end|>", "b": "No end", "c": " <|end|>"}[prompt[-len("?<|end|><|assistant|>") - 1]]
        return "Hm<|end|>" if "Yes." in prompt else f"Is it a matter of letter {next(letters)}?<|end|>"

    letters = iter("abc")
    result = synthesize(write, 3, max_asked=3, num_turns=2, near_duplicate_threshold=None)
    assert len(result.dataset) == 0 and result.dataset.column_names[0] == "prompt"
    assert result.report.dropped == {"too_short": 1, "unfinished_completion": 1, "empty_completion": 1}


def test_a_conversation_that_outgrows_the_context_is_dropped():
    engine = ScriptedEngine(listed(["A very long question, " + "w" * 30 + "?", "Short?", "And then?"]), context=100)
    report = synthesize(
        engine, 2, max_asked=2, num_turns=2, max_new_tokens=60, max_completion_tokens=10, near_duplicate_threshold=None
    ).report
    assert report.dropped == {"context_full": 1} and report.kept == 1
    with pytest.raises(ValueError, match="does not fit"):
        synthesize(ScriptedEngine(drawn, context=50), 2, max_new_tokens=60)


@pytest.mark.parametrize("error", [UnusablePromptError("a text", "not_text"), ValueError("of another tokenizer")])
def test_only_a_prompt_that_is_at_fault_itself_costs_no_more_than_its_conversation(error):
    class Refusing(ScriptedEngine):
        def check(self, prompts, options, signal):
            if any("Strange?" in self.tokenizer.decode(ids) for ids in prompts):
                raise error

    engine = Refusing(listed(["Strange?", "Short?", "And then?"]))
    options = {"num_turns": 2, "max_asked": 2, "near_duplicate_threshold": None}
    if isinstance(error, UnusablePromptError):
        report = synthesize(engine, 2, **options).report
        assert report.dropped == {"not_text": 1} and report.kept == 1
    else:
        with pytest.raises(ValueError, match="of another tokenizer"):
            synthesize(engine, 2, **options)


def test_temperature_and_top_p_are_gone_through_in_turn():
    engine = ScriptedEngine(drawn)
    result = synthesize(engine, 12, temperature=[0.7, 1.0, 1.3], top_p=[1.0, 0.9], near_duplicate_threshold=None)
    settings = Counter()
    for texts, options in engine.calls:
        settings[options.temperature, options.top_p] += len(texts)
    assert settings == {(t, p): 2 for t in (0.7, 1.0, 1.3) for p in (1.0, 0.9)}
    assert result.report.by_sampling == [
        {"temperature": t, "top_p": p, "asked": 2, "good": 2} for t, p in sorted(settings)
    ]


def test_what_an_engine_writes_behind_the_turn_is_cut_off():
    """It does not stop where the template ends the user's turn."""

    class RunOnEngine(ScriptedEngine):
        def generate(self, prompts, options, signal=None, seed=""):
            self.calls.append(prompts)
            ids = self.tokenizer("How tall is it?<|end|><|assistant|>Three metres.")["input_ids"]
            return [Completion(ids, "length") for _ in prompts]

    assert get_queries(synthesize(RunOnEngine(None), 1)) == ["How tall is it?"]


def test_template_variables_reach_the_template_and_the_rows():
    engine = ScriptedEngine(drawn)
    engine.tokenizer.chat_template = "{{ mood }}" + engine.tokenizer.chat_template
    result = synthesize(engine, 2, chat_template_kwargs={"mood": "glad", "is_short": True})
    assert {text for texts, _ in engine.calls for text in texts} == {"glad<|user|>"}
    assert result.dataset["chat_template_kwargs"][:] == [{"mood": "glad", "is_short": True}] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 0}, "`num_queries` is 0, but must be at least 1"),
        ({"max_asked": 0}, "`max_asked` is 0"),
        ({"temperature": [1.0, 0.0]}, "`temperature` is 0.0, but must be above 0"),
        ({"temperature": []}, "`temperature` is an empty list"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"num_turns": 0}, "`num_turns` is 0"),
        ({"tool_catalog": TOOLS, "num_tools": 5}, "asks for 5 tools, but the catalog has 4"),
        ({"system_prompts": "Use {tools}."}, "no `tool_catalog` to fill it"),
        ({"system_prompts": "Use {tools}.", "tool_catalog": TOOLS}, "set `keep_system_prompt=True`"),
        ({"test_set": Dataset.from_dict({"prompt_ids": [[5]]})}, "give a `prompt`"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(options, message):
    engine = ScriptedEngine(drawn)
    with pytest.raises(ValueError, match=message):
        synthesize(engine, **{"num_queries": 2, **options})
    assert not engine.calls


def test_an_engine_that_lacks_top_p_refuses_it_before_anything_is_written():
    class Plain(ScriptedEngine):
        def check(self, prompts, options, signal):
            if options.is_truncated:
                raise UnsupportedByEngineError("no top-p")

    with pytest.raises(UnsupportedByEngineError, match="no top-p"):
        synthesize(Plain(drawn), 2, top_p=[1.0, 0.9])


def test_answers_without_exact_ids_are_counted():
    class Unmapped(ScriptedEngine):
        def generate(self, prompts, options, signal=None, seed=""):
            completions = super().generate(prompts, options, signal, seed)
            raise UnidentifiedTokensError([["bytes"], []], [None, completions[1]])

    result = synthesize(Unmapped(drawn), 2, max_asked=2)
    assert result.report.dropped == {"unidentified_tokens": 1} and len(result.dataset) == 1
