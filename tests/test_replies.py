"""One extractor reads every form of reply that models write, and never makes an answer up."""

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.reply import read_reply


pytestmark = pytest.mark.any_release


ANIMALS = ["dog", "cat", "3 cats", "a red bird"]
COLOURS = ["red", "dark red", "blue", "green"]
NUMBERS = ["1", "2", "12", "0"]
CLOSER = ["A is closer", "B is closer"]
LETTERS = ["A", "B", "C", "D"]
SIDES = ["left", "right"]
ANSWERS = ["yes", "no"]

# What stands in formats.md comes first; B is "cat".
READ = r"""
B | (B) | B. | (B). | b | (b) | b. | b) | B) | [B] | {B} | $B$ | "B" | 'B' | <B> | (B | B: | B, | -> B | ✅ B | `B` | **B** | *B* | __B__ | **(B)**
Answer: B | Answer: (B) | answer: b | ANSWER: B. | Answer:B | Answer - B | Answer B | Answer (B) | **Answer:** B | **Answer**: B | Answer: **B**
Answer:\nB | Answer:\n\n(B) | ### Answer\nB | Final answer: B | Final Answer: (B). | The final answer is: $\\boxed{B}$ | Ans: B | Answer => B
The answer is B | The answer is B. | The answer is (B) | The answer is: B | the answer is b | The correct answer is B | My answer is B
The answer is option B | The correct option is B | The correct choice is option (B). | The best answer is: (B) cat | The right answer is B, because
The answer is most likely B. | The answer would be B | The answer should be (B) | The answer to the question is B. | So the answer is **B**.
\\boxed{B} | $\\boxed{B}$ | \\boxed{(B)} | \\boxed{\\text{B}} | \\boxed{\\text{(B)}} | \\boxed{\\mathrm{B}} | \\boxed{B. cat} | \\boxed{cat} | \\boxed{b} | boxed{B} | \\boxed{B
<answer>B</answer> | <answer> (B) </answer> | <answer>\nB\n</answer> | <answer>cat</answer> | <answer>B. cat</answer> | <answer>\\boxed{B}</answer> | <answer>B | <ANSWER>B</ANSWER>
<think>Is it A? No.</think>B | <think>A or C</think>\n<answer>B</answer> | A or D?</think> (B)
B cat | B. cat | B) cat | (B) cat | [B] cat | B: cat | B - cat | B – cat | B, cat | B\ncat | b) cat | b. cat | (b) cat | Answer: (B) cat | Answer: B. cat | B.cat | B: the cat
cat | Cat | CAT. | the cat | a cat | A cat | "cat" | cat! | It is a cat. | I think it is a cat | This shows the cat. | The answer is cat. | The answer is a cat | The correct answer is the cat.
Option B | option b | option B. | Option (B) | Choice B | Option B is correct. | B is correct | B is the correct answer. | (B) is the best choice | I choose B | I would go with (B). | I'll pick option B.
It's B. | I think B | I believe it is (B). | It must be B. | Based on the picture, it's (B). | B because it has whiskers. | B, since it has whiskers
The picture shows whiskers.\nB | B\n\nThe picture shows whiskers. | It has whiskers. So the answer is B | It has whiskers. B | Therefore, (B). | Thus, B. | Clearly, B. | B) cat, not A) dog
(A) has a tail. (B) has whiskers. Therefore, the answer is (B). | A: no. B: yes.\nAnswer: B | Answer: A. Wait, that is wrong. Answer: B | The answer is A... no, the answer is B.
\\boxed{A} is what I thought, but finally \\boxed{B} | (A) dog\n(B) cat\n\nAnswer: (B) | It could be (A), (C) or (D), but the answer is (B).
Not A, but B | It is not (A). It is (B). | Option A is incorrect. Option B is correct. | The answer is not A, it is B.
Ｂ | （Ｂ） | （B） | 答案：B | 答案是B | 答案是（B）。 | 正确答案是B | 选B | 选择B。 | 故选：B | 答案为 B | 【B】 | Ｂ．cat
{"answer": "B"} | B<|im_end|> | B</s> |  B  | B\n | B B B | <b>B</b> | \\(B\\) | \\[B\\] | \\text{B} | The answer is $B$. | Answer: \\textbf{B} | > B | - B
"""
UNREAD = [
    ("", ANIMALS), (None, ANIMALS), ("   \n", ANIMALS), ("...", ANIMALS), ("?", ANIMALS), ("()", ANIMALS),
    ("I don't know.", ANIMALS), ("I cannot tell.", ANIMALS), ("It's neither", ANIMALS), ("None of the above", ANIMALS),
    ("A or B", ANIMALS), ("A and B", ANIMALS), ("A, B", ANIMALS), ("A/B", ANIMALS), ("AB", ANIMALS), ("ABCD", ANIMALS), ("(A) or (B)", ANIMALS),
    ("Answer: A or B", ANIMALS), ("The answer is A and C", ANIMALS), ("Both A and B are correct", ANIMALS), ("A\nB", ANIMALS),
    ("A. B. C. D.", ANIMALS), ("(A) dog\n(B) cat\n(C) 3 cats", ANIMALS), ("(A) dog (B) cat", ANIMALS), ("dog or cat", ANIMALS), ("It's A. No, it's B.", ANIMALS),
    ("E", ANIMALS), ("(E)", ANIMALS), ("Answer: E", ANIMALS), ("\\boxed{F}", ANIMALS), ("The answer is Z.", ANIMALS), ("C", ["dog", "cat"]),
    ("Answer: A. No: Answer: E", ANIMALS), ("5", ANIMALS), ("2", ANIMALS), ("Option 2", ANIMALS),
    ("A horse", ANIMALS), ("I think it is a horse", ANIMALS), ("a horse", ANIMALS), ("Definitely", ANIMALS), ("Because of the tail", ANIMALS),
    ("Could be", ANIMALS), ("An image", ANIMALS), ("A picture of a horse.", ANIMALS), ("Certainly! A horse.", ANIMALS), ("Definitely purple", COLOURS),
    ("The answer is a horse.", ANIMALS), ("Answer: a horse", ANIMALS), ("The answer is not (B)", ANIMALS), ("Not A", ["dog", "cat"]),
    ("It is not a dog.", ["dog", "cat"]), ("There is no cat", ["dog", "cat"]), ("cats", ["dog", "cat"]), ("The answer is unclear", SIDES),
    ("The right answer is unclear.", SIDES), ("There is no way to tell", ANSWERS), ("A. cat", ["dog", "cat"]), ("Answer: (A) cat", ["dog", "cat"]),
    ("I cannot determine whether it is a cat", ANIMALS), ("e.g. a horse", ANIMALS), ("U.S. flag", ANIMALS), ("A-frame", ANIMALS), ("D-Day", ANIMALS),
    ("Is it a dog?", ANIMALS), ("C++", ANIMALS), ("C'est un cheval", ANIMALS), ("D'accord", ANIMALS), ("Vitamin C tablets", ANIMALS), ("<think>The answer is B", ANIMALS), ("red", ["red", "red"]), ("The answer is", ANIMALS), ("Answer:", ANIMALS),
    ("Answer: I don't know", ANIMALS), ("(s)", ANIMALS), ("I", ANIMALS), ("答案：A或B", ANIMALS),
    ("The answer is neither A nor B", ANIMALS), ("The answer can't be A.", ["dog", "cat"]), ("A is wrong.", ["dog", "cat"]),
]  # fmt: skip
BY_TEXT = [
    ("Definitely blue", COLOURS, "C"), ("dark red", COLOURS, "B"), ("Dark Red.", COLOURS, "B"), ("red", COLOURS, "A"), ("It is dark red.", COLOURS, "B"),
    ("The car is red", COLOURS, "A"), ("more blue than green", COLOURS, "C"), ("It is not red, it's blue.", COLOURS, "C"), ("Answer: dark red", COLOURS, "B"),
    ("2", NUMBERS, "B"), ("12", NUMBERS, "C"), ("12.", NUMBERS, "C"), ("There are 2 dogs.", NUMBERS, "B"), ("\\boxed{12}", NUMBERS, "C"),
    ("0", NUMBERS, "D"), ("The answer is 1.", NUMBERS, "A"), ("-2", ["2", "-2"], "B"), ("2.5", ["2", "2.5"], "B"), ("$45^\\circ$", ["30°", "45°"], "B"),
    ("A is closer", CLOSER, "A"), ("B is closer.", CLOSER, "B"), ("A is closer to the camera", CLOSER, "A"), ("A is closer", CLOSER[::-1], "B"),
    ("B", LETTERS, "B"), ("Point B", LETTERS, "B"), ("(C)", LETTERS, "C"), ("A", ["B", "A"], "A"), ("Box B", ["Box A", "Box B"], "B"),
    ("The second image", ["the second image", "the third image"], "A"), ("third image", ["the second image", "the third image"], "B"),
    ("Left.", SIDES, "A"), ("On the right.", SIDES, "B"), ("The dog is on the left side of the car.", ["The dog is on the left side of the car.", "No"], "A"),
    ("Yes", ANSWERS, "A"), ("No, there is none.", ANSWERS, "B"), ("no", ANSWERS, "B"), ("Yes, it is.", ANSWERS, "A"),
    ("A red bird", ANIMALS, "D"), ("3 cats", ANIMALS, "C"), ("Answer: (C) 3 cats", ANIMALS, "C"), ("C. 3 cats", ANIMALS, "C"), ("A dog", ANIMALS, "A"),
    ("A. dog", ANIMALS, "A"), ("A", ANIMALS, "A"), ("a", ANIMALS, "A"), ("A is correct.", ANIMALS, "A"), ("A because it barks", ANIMALS, "A"),
    ("Cannot be determined", ["yes", "cannot be determined"], "B"), ("None of the above", ["yes", "None of the above"], "B"),
    ("A and B", ["only A", "A and B"], "B"), ("猫", ["狗", "猫"], "B"), ("答案是猫", ["狗", "猫"], "B"), ("B. 猫", ["狗", "猫"], "B"), ("B、猫", ["狗", "猫"], "B"),
    ("△", ["○", "△"], "B"), ("ＲＥＤ", COLOURS, "A"), ("It can’t be red; it’s green", COLOURS, "D"),
]  # fmt: skip


def forms():
    return [
        form.replace("\\n", "\n").replace("\\\\", "\\")
        for line in READ.strip().splitlines()
        for form in line.split(" | ")
    ]


@pytest.mark.parametrize("reply", forms())
def test_every_form_of_a_reply_is_read(reply):
    assert read_reply(reply, ANIMALS) == "B"


@pytest.mark.parametrize(("reply", "options"), UNREAD)
def test_what_is_no_answer_is_not_read(reply, options):
    assert read_reply(reply, options) is None


@pytest.mark.parametrize(("reply", "options", "letter"), BY_TEXT)
def test_the_text_of_one_option_is_read(reply, options, letter):
    assert read_reply(reply, options) == letter


WRAPPERS = [
    "{}", "({})", "[{}]", "{}.", "**{}**", "Answer: {}", "Answer: ({})", "The answer is {}.", "The correct option is ({}).", "\\boxed{{{}}}",
    "<answer>{}</answer>", "Option {}", "I looked at it closely.\n{}", "答案：{}",
]  # fmt: skip
letters = st.sampled_from(string.ascii_uppercase)
words = st.text(string.ascii_letters + " .,'!-", max_size=60)


@settings(max_examples=150, deadline=None)
@given(letters, st.integers(1, 26), st.sampled_from(WRAPPERS))
def test_a_letter_is_read_in_every_wrapper_or_rejected_beyond_the_options(letter, num_options, wrapper):
    expected = letter if letter in string.ascii_uppercase[:num_options] else None
    assert read_reply(wrapper.format(letter), None, num_options) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(string.ascii_lowercase + string.digits, min_size=2, max_size=8), min_size=2, max_size=6, unique=True
    ),
    st.data(),
)
def test_the_text_of_an_option_is_its_letter_and_both_agree(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    letter, option = string.ascii_uppercase[index], options[index]
    for reply in (
        option,
        option.upper(),
        f"{option}.",
        f"({letter}) {option}",
        f"{letter}. {option}",
        f"Answer: {letter}. {option}",
    ):
        assert read_reply(reply, options) == letter
    other = options[index - 1]
    assert read_reply(f"({letter}) {other}", options) is None


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), words), st.lists(st.text(max_size=12), min_size=1, max_size=8))
def test_any_text_gives_an_available_letter_or_none_and_always_the_same(text, options):
    letter = read_reply(text, options)
    assert letter is None or letter in string.ascii_uppercase[: len(options)]
    assert read_reply(text, options) == letter


@settings(max_examples=150, deadline=None)
@given(st.sampled_from("BCDEFGH"), st.text(string.ascii_lowercase, min_size=2, max_size=10))
def test_no_word_is_read_by_its_first_letter(letter, rest):
    for reply in (letter + rest, f"{letter}{rest} zzzz", f"A {rest}", f"I {rest}"):
        assert read_reply(reply, ["xxxx", "yyyy", "wwww", "vvvv", "uuuu", "tttt", "ssss", "rrrr"]) is None or rest in ("because", "since", "as", "for", "is", "are", "was")  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(letters, min_size=1, max_size=5))
def test_the_last_statement_of_the_answer_counts(stated):
    text = " ".join(f"I look again. The answer is {letter}." for letter in stated)
    assert read_reply(text, None, 26) == stated[-1]


def test_long_degenerate_replies_take_no_time():
    start = time.perf_counter()
    for text in (
        "\n" * 20000,
        "answer is " * 1000,
        "(A) " * 3000,
        "(B) is " * 2000,
        "\\boxed{" * 3000,
        "**" * 9000,
        "<b>" * 2000,
    ):
        read_reply(text, ANIMALS)
    assert time.perf_counter() - start < 20  # quadratic readings took minutes


@pytest.mark.parametrize("options", [[], ["x"] * 27])
def test_options_without_letters_are_refused(options):
    with pytest.raises(ValueError, match=f"`options`.*got {len(options)}"):
        read_reply("A", options)
