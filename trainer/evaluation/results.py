"""Puts the answers of all arms together: scores per task and in total, differences with intervals, costs."""

from collections import Counter
from itertools import combinations

from scipy.stats import binomtest

from model_cards import weights_fingerprint

from .reply import LETTERS, read_reply
from .scores import accuracy_by_task, chance_hits, constant_answers, paired_bootstrap, total_score


TOTAL = "total"


def summarize(question_set, arms, answers, settings, confidence=0.95, num_resamples=10000):
    """
    The results of a benchmark.

    Args:
        question_set ([`QuestionSet`]): what was asked.
        arms (`list[Arm]`): in the order of the columns; differences are of a later one to an earlier one.
        answers (`dict[str, dict[int, dict]]`): by arm and number of the question, all of them.
        settings (`dict`): of the run, passed through; its `seed` is that of the bootstrap, too.
        confidence (`float`, defaults to 0.95), num_resamples (`int`, defaults to 10000): see [`paired_bootstrap`].

    Returns:
        `dict`: plain data. `columns` holds accuracies in 0..1 by column and task, and as `total`; `arms` what each arm is, its
        `intervals`, `unparsed`, `letter_accuracy`, `tokens_per_answer` and `seconds_per_answer`; `differences` one entry per
        pair of arms and task, with the ends of its interval.

    Raises:
        ValueError: an arm that has not answered everything.
    """
    questions, rule = question_set.questions, question_set.rule
    tasks = [question.task for question in questions]
    groups = [question.group for question in questions]
    gold = [question.gold for question in questions]
    for arm in arms:
        if missing := len(questions) - len(answers[arm.name]):
            raise ValueError(f"`{arm.name}` has not answered {missing} of {len(questions)} questions: run it again.")
    places = {task: [place for place, other in enumerate(tasks) if other == task] for task in dict.fromkeys(tasks)}
    chance = chance_hits([question.num_options for question in questions])
    constant, (letters, total) = constant_answers(gold, tasks, rule)
    columns = {
        "chance": _accuracies(chance, tasks, rule),
        "constant": {**{task: score for task, (_, score) in constant.items()}, TOTAL: total},
    }

    def interval(first, second, task):
        rows = range(len(questions)) if task == TOTAL else places[task]
        strata = [tasks[row] for row in rows] if task == TOTAL and rule == "mean over tasks" else None
        picked = ([values[row] for row in rows] for values in (first, second, groups))
        return paired_bootstrap(*picked, strata, confidence, num_resamples, settings["seed"])

    def own_interval(hits, task):
        """Wilson's for a mean over rows that are drawn each on its own: a bootstrap of no hit, or of hits alone, has no width."""
        rows = range(len(questions)) if task == TOTAL else places[task]
        if (task == TOTAL and rule == "mean over tasks") or len({groups[row] for row in rows}) < len(rows):
            return list(interval([0.0] * len(questions), hits, task)[1:])
        test = binomtest(int(sum(hits[row] for row in rows)), len(rows))
        return list(map(float, test.proportion_ci(confidence, method="wilson")))

    hits, facts = {}, {}
    for arm in arms:
        given = answers[arm.name]
        read = [
            read_reply(given[number]["text"], question.options, question.num_options)
            for number, question in enumerate(questions)
        ]
        hits[arm.name] = [float(letter == right) for letter, right in zip(read, gold)]
        columns[arm.name] = _accuracies(hits[arm.name], tasks, rule)
        facts[arm.name] = {
            "path": arm.path,
            "model_type": arm.model_type,
            "latents": "prior" if arm.source == "prior" else "none",
            "k": arm.num_latents,
            "tau": arm.temperature,
            "image_budget": arm.image_budget,
            **arm.version,
            "weights_sha256": weights_fingerprint(arm.path, arm.version.get("revision") or arm.version.get("commit")),
            "unparsed": read.count(None),
            "letters": dict(sorted(Counter(filter(None, read)).items())),
            "letter_accuracy": _letter_accuracy(given, questions, tasks, rule),
            "tokens_per_answer": sum(answer["num_tokens"] for answer in given.values()) / len(given),
            "seconds_per_answer": sum(answer["seconds"] for answer in given.values()) / len(given),
            "intervals": {task: own_interval(hits[arm.name], task) for task in columns[arm.name]},
        }
    differences = []
    for first, second in combinations(hits, 2):
        for task in [TOTAL, *places]:
            difference, low, high = interval(hits[first], hits[second], task)
            differences.append(dict(first=first, second=second, task=task, difference=difference, low=low, high=high))
    return {
        "benchmark": question_set.benchmark,
        "rule": rule,
        "num_questions": {**{task: len(rows) for task, rows in places.items()}, TOTAL: len(questions)},
        "settings": settings,
        "data": question_set.report,
        "columns": columns,
        "constant_letters": {**{task: letter for task, (letter, _) in constant.items()}, TOTAL: letters},
        "arms": facts,
        "differences": differences,
    }


def _accuracies(hits, tasks, rule):
    return {**accuracy_by_task(hits, tasks), TOTAL: total_score(hits, tasks, rule)}


def _letter_accuracy(given, questions, tasks, rule):
    """The score of the likeliest letter among each row's options, by task and in total; `None` where it was not asked for."""
    if any(answer["letter_scores"] is None for answer in given.values()):
        return None
    hits = []
    for number, question in enumerate(questions):
        scores = given[number]["letter_scores"]
        hits.append(float(LETTERS[scores.index(max(scores))] == question.gold))
    return _accuracies(hits, tasks, rule)
