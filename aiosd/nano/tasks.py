"""Tasks for nano, made from seeds: a request, files and notes, a reference solution, and a check of an agent's work.

`make(seed, split)` makes one task. HELD tasks are about names, words and numbers that no TRAIN task has. FRESH tasks
are, moreover, asked in phrases that no TRAIN task uses (as are HELD tasks whose phrase has no slot to fill). A
checksum selects these phrases, so that no person does. The same arguments give the same task on any machine.

The reference solution is a small program that calls tools. It runs against a `World`, which is the ReAct agent's own
toolkit with a dict instead of a folder. It gives the dialogue to learn from, and what `check` compares an agent's work
with: the answer must contain certain words, and files and notes must be the same in the end.
"""

import posixpath
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiosd.nano import phrases as ph
from aiosd.nano.tokenizer import load
from libaios.agents.react import SYSTEM, TOOLS, ChatMessage, ToolError, Toolkit

TRAIN, HELD, FRESH = "train", "held", "fresh"
KEEP_BACK = 12  # one of 12 phrases is never trained on

THOUGHTS = {
    "calc": "I will calculate it.",
    "remember": "I will make a note.",
    "recall": "I will look in my notes.",
    "read_file": "I will read the file.",
    "write_file": "I will write the file.",
}


#: Words that decide what a request means; they are never replaced by others.
MEANING = frozenset(
    """a add after all an and any are area as average away be both bring but by bye calculate called can cannot compute
    copy cost cut decrease delete difference divide divided do does double each equals every fetch file files find first
    five forget four from get give goes half halve hello hi hour how i in increase into is it its keep left less letter
    list load look lost made make many me memory minus minutes more much multiplied multiply my named no not note noted
    notes number numbers of off on one open out over per percent place plus power product put quarter raise raised
    read recall remainder remember remind result root same save saved say says second seven share shared show six
    square squared store sum subtract take tell ten text thank thanks that the them then there third this three times
    to total triple twice two up us value was were what when where which who whose why will with work write written you
    your zero""".split()
)


class World(Toolkit):
    """The agent's tools, working on files in a dict."""

    def __init__(self, files: dict[str, str], notes: list[str]) -> None:
        self.files = dict(files)
        self.notes = list(notes)
        self.notes_file = None

    def read_file(self, path: str) -> str:
        text = self.files.get(self._checked(path))
        if text is None:
            raise ToolError(f"no such file: {path}")
        return text.rstrip("\n")

    def write_file(self, path: str, content: str) -> str:
        self.files[self._checked(path)] = content + "\n"
        return "ok"

    @staticmethod
    def _checked(path: str) -> str:
        normal = posixpath.normpath(path)
        if normal.startswith(("../", "/")) or normal == "..":
            raise ToolError(f"outside the working folder: {path}")
        return normal


class ToolFailed(Exception):
    """A tool returned an error; the solution then ends with an apology."""


Do = Callable[..., str]
Solution = Callable[[Do], tuple[str, list[str]]]  # returns the answer, and what every right answer contains


@dataclass(frozen=True)
class Task:
    family: str
    prompt: str
    solution: Solution
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def world(self) -> World:
        return World(self.files, self.notes)

    def solve(self, world: World) -> tuple[list[ChatMessage], list[str]]:
        """Solve the task in a world. Returns the dialogue from prompt to answer, and what the answer must contain."""
        dialogue: list[ChatMessage] = [{"role": "user", "content": self.prompt}]

        def do(tool: str, **arguments: str) -> str:
            call = {"name": tool, "arguments": arguments}
            dialogue.append({"role": "assistant", "content": THOUGHTS[tool], "tool_calls": [{"function": call}]})
            observation = world.call(tool, arguments)
            dialogue.append({"role": "tool", "content": observation})
            if observation.startswith("error: "):
                raise ToolFailed(observation.removeprefix("error: "))
            if tool == "recall" and observation == "nothing found":
                raise LookupError
            return observation

        try:
            answer, musts = self.solution(do)
        except ToolFailed as e:
            answer, musts = f"Sorry, that failed: {e}.", [str(e).split(":")[0]]
        except LookupError:
            answer, musts = "I have no note about that.", ["no note"]
        dialogue.append({"role": "assistant", "content": answer})
        return dialogue, musts

    def calls(self) -> int:
        """How many tool calls the reference solution makes."""
        return sum(m["role"] == "tool" for m in self.solve(self.world())[0])


def check(task: Task, answer: str, files: dict[str, str], notes: list[str]) -> str | None:
    """What is wrong with an agent's work on a task, or None. `files` and `notes`: those after the work."""
    world = task.world()
    _, musts = task.solve(world)
    said = _plain(answer)
    for must in musts:
        if not re.search(rf"(?<![\w.]){re.escape(_plain(must))}(?!\w|\.\d)", said):
            return f"the answer lacks {must!r}"
    for path in files.keys() | world.files.keys():
        if _plain(files.get(path, "")) != _plain(world.files.get(path, "")):
            return f"{path} holds {files.get(path)!r}, not {world.files.get(path)!r}"
    new, wanted = notes[len(task.notes) :], world.notes[len(task.notes) :]
    if notes[: len(task.notes)] != task.notes or len(new) != len(wanted):
        return f"notes are {notes!r}"
    for note, want in zip(new, wanted, strict=True):
        if _plain(want) not in _plain(note):
            return f"noted {note!r}, not {want!r}"
    return None


def kept_back(phrases: list[Any]) -> tuple[list[Any], list[Any]]:
    """The phrases of a list that may be trained on, and those that may not. A phrase that comes with a formula (or
    another statement of its meaning) is held back only if another phrase with the same formula is trained on."""
    known = _KEPT_BACK.get(id(phrases))
    if known is None:
        kept = [p for p in phrases if "{any" not in str(p) and zlib.crc32(f"kept back: {p}".encode()) % KEEP_BACK == 0]
        meanings = {p[1] for p in phrases if isinstance(p, tuple) and len(p) == 2 and p not in kept}
        kept = [p for p in kept if not (isinstance(p, tuple) and len(p) == 2) or p[1] in meanings]
        known = _KEPT_BACK[id(phrases)] = ([p for p in phrases if p not in kept], kept)
    return known


_KEPT_BACK: dict[int, tuple[list[Any], list[Any]]] = {}  # by id(): the lists are constants of a module


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!\"'")


def make(seed: int, split: str = TRAIN, family: str | None = None) -> Task:
    """Make one task, of the given family or of one chosen by weight."""
    source = PhraseSource(random.Random(f"nano {split} {seed}"), split)
    name = family or source.rng.choices(list(FAMILIES), [w for _, w in FAMILIES.values()])[0]
    return FAMILIES[name][0](source)


def conversation(seed: int, split: str = TRAIN) -> tuple[list[ChatMessage], list[dict[str, Any]] | None]:
    """A dialogue to train on (some tasks one after the other in one world), and the tools that its prompt lists."""
    rng = random.Random(f"nano conversation {split} {seed}")
    tasks = [make(rng.getrandbits(48), split) for _ in range(rng.choices([1, 2, 3], [90, 8, 2])[0])]
    tools: list[dict[str, Any]] | None = list(TOOLS)
    style = rng.random()
    if style < 0.03:
        tasks = [make(rng.getrandbits(48), split, "talk") for _ in range(2)]
        tools = None
    elif style < 0.08:
        assert tools is not None
        rng.shuffle(tools)
    system = rng.choices([SYSTEM, "You are a helpful agent.", None, "You are nano."], [70, 14, 10, 6])[0]
    messages: list[ChatMessage] = [] if system is None else [{"role": "system", "content": system}]
    world = World({}, [])
    for task in tasks:
        world.files |= task.files
        world.notes += task.notes
        messages += task.solve(world)[0]
        for path in task.files:
            world.files.pop(path, None)
    return messages, tools


class PhraseSource:
    """Random words, numbers and phrases of one split."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng = rng
        self.held = split != TRAIN
        self.fresh = split == FRESH
        self.ranges = HELD_RANGES if self.held else self._alike() if self.chance(0.4) else []

    # --- choices

    def pick(self, train: Sequence[Any], held: Sequence[Any]) -> Any:
        """An item of the list for this split."""
        return self.rng.choice(held if self.held else train)

    def choose(self, phrases: list[Any]) -> Any:
        """A phrase that the split may use. Phrases with a slot for any word are chosen more rarely."""
        taught, kept = kept_back(phrases)
        among = taught
        if self.fresh:
            among = kept or taught
        elif self.held:  # a phrase without slots is new only if it was held back
            among = [p for p in phrases if ("{" in str(p)) == (p in taught)] or taught
        item = self.rng.choice(among)
        return self.rng.choice(among) if "{any" in str(item) and self.chance(0.6) else item

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def spell_out(self, template: str) -> str:
        """Replace each `[a|b]` by one of its choices."""
        return re.sub(r"\[([^\]]*)\]", lambda m: self.rng.choice(m[1].split("|")), template)

    def phrase(self, phrases: list[str]) -> str:
        """A phrase with its choices made. The caller fills its slots."""
        return self.spell_out(self.choose(phrases)).replace("{any}", self.word())

    def say(
        self,
        template: str,
        /,
        *,
        polite: bool = True,
        strange: bool = True,
        slots: dict[str, str] | None = None,
        **more: str,
    ) -> str:
        """Turn a phrase into a request: make its choices, add polite words and sloppy spelling, replace some words by
        strange ones (not where another word could change a sum), and at last fill the slots."""
        text = self.spell_out(template)
        if polite:
            if text[0].islower():
                text = self.spell_out(self.choose(ph.POLITE)).replace("{o}", text)
                if text.endswith(("?.", "..")):
                    text = text[:-1]
            elif self.chance(0.12):
                text = self.choose(ph.LEAD) + text
            text = self._sloppy(text)
        if strange and not self.held and self.chance(0.2):
            text = self._strange(text)
        filled = {"any": self.word(), "any2": self.word()} | (slots or {}) | more
        return re.sub(r"\{(\w+)\}", lambda m: filled[m[1]], text)

    def _strange(self, text: str) -> str:
        """Replace some words that do not decide the meaning, so that the model learns to find where a text or a name
        begins and ends between words that it has never seen there."""
        words = text.split(" ")
        for i, word in enumerate(words):
            if word.isalpha() and word.lower() not in MEANING and self.chance(0.1):
                words[i] = self.word()
        return " ".join(words)

    def _sloppy(self, text: str) -> str:
        style = self.rng.random()
        if text[0].isalpha() and style < 0.55:
            text = text[0].upper() + text[1:]
        elif style > 0.85:  # names of slots stay as they are: {X} is not {x}
            text = re.sub(r"\{\w+\}|[^{}]+", lambda m: m[0] if m[0][0] == "{" else m[0].lower(), text)
        if self.chance(0.12):
            text = text.rstrip(".?!")
        if self.chance(0.03):
            text += self.rng.choice(["!", " ", "?", "..", " :)", "!!", "\n"])
        return text

    # --- words

    def word(self) -> str:
        return self.made_up() if self.chance(0.22 if self.held else 0.33) else self.rng.choice(ph.COMMON)

    def made_up(self) -> str:
        style = 1.0 if self.held else self.rng.random()
        if style < 0.2:  # of letters
            pairs = [self.rng.choice("bcdfghjklmnpqrstvwxyz") + self.rng.choice("aeiouy") for _ in range(4)]
            return "".join(pairs)[self.rng.randint(0, 1) : self.rng.randint(4, 8)]
        if style < 0.7:  # of tokens of the vocabulary, so that the model learns to copy each of them
            made = "".join(self.rng.choice(PIECES) for _ in range(self.rng.choice([1, 2, 2, 2, 3])))
            return made if made not in HELD_WORDS else made[:-1]
        syllables = self.pick(ph.SYLLABLES, ph.SYLLABLES_HELD)
        parts = [syllables] + [self.rng.choice(ph.SYLLABLES) for _ in range(self.rng.randint(1, 3))]
        return "".join(parts)

    def name(self) -> str:
        return self.made_up().capitalize() if self.chance(0.25) else str(self.pick(ph.NAMES, ph.NAMES_HELD))

    def city(self) -> str:
        return self.made_up().capitalize() if self.chance(0.3) else str(self.pick(ph.CITIES, ph.CITIES_HELD))

    def words(self, least: int, most: int) -> str:
        return " ".join(self.word() for _ in range(self.rng.randint(least, most)))

    def code(self) -> str:
        letters = "abcdefghijklmnopqrstuvwxyz" if self.chance(0.5) else "ABCDEFGHJKLMNPQRSTUVWXYZ"
        return "".join(self.rng.choice(letters + "0123456789-"[:10]) for _ in range(self.rng.randint(3, 8)))

    def time(self) -> str:
        form = self.rng.choice(["{h}:{m}", "{h}:{m}", "{h} o'clock", "{h} pm", "{h} am", "{h}pm", "noon"])
        return form.format(h=self.rng.randint(1, 23), m=self.rng.choice(["00", "15", "30", "45", "05", "20", "50"]))

    def file(self) -> str:
        stem = self.pick(ph.STEMS, ph.STEMS_HELD)
        if self.chance(0.2 if self.held else 0.55):
            stem = self.made_up()
        if self.chance(0.15):
            stem += self.rng.choice(["_", "-", ""]) + self.rng.choice([self.word(), str(self.rng.randint(1, 99))])
        if self.chance(0.05):
            stem = stem.upper() if self.chance(0.3) else stem.capitalize()
        name = f"{stem}.{self.rng.choice(ph.SUFFIXES)}" if self.held or self.chance(0.95) else stem + "file"
        if self.chance(0.1):
            name = f"{self.pick(ph.FOLDERS, ph.FOLDERS_HELD)}/{name}"
        return str(name)

    def quoted(self, path: str) -> str:
        """A file's name as people write it."""
        return self.rng.choices([path, f'"{path}"', f"'{path}'", f"`{path}`"], [86, 5, 6, 3])[0]

    # --- numbers

    def number(self, most: int = 9_999_999) -> str:
        """An integer up to `most`; short ones are more frequent. Held-out numbers lie in ranges of their own: 40-44,
        80-84, 300-349, 7200-7499, 61000-61999, 500000-509999. So they look alike or are equal, and are harder to copy;
        some of the tasks to train on have narrow ranges, too."""
        ranges = [r for r in self.ranges if r[1] <= most]
        while True:
            if ranges:
                n = self.rng.randint(*self.rng.choices(ranges, [4, 4, 4, 2, 1, 1][: len(ranges)])[0])
            else:
                n = self.rng.randint(1, min(most, 10 ** self.rng.choice([1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6])))
            if self.held or not _is_held(n):
                return str(n)

    def _alike(self) -> list[tuple[int, int]]:
        """Ranges as narrow as the held-out ones, but other ones."""
        ranges = []
        for width, least in ((4, 1), (4, 10), (49, 100), (299, 1_000), (999, 10_000), (9_999, 100_000)):
            while True:
                low = self.rng.randint(least, 10 * max(least, 10) - 1 - width)
                if not _is_held(low) and not _is_held(low + width):
                    ranges.append((low, low + width))
                    break
        return ranges

    def amount(self) -> str:
        """A number in an expression: mostly whole, sometimes with decimals."""
        style = self.rng.random()
        if style < 0.9:
            return self.number()
        if style < 0.97:
            return f"{self.number(999)}.{self.rng.choice(['5', '25', '75', '99', '50', '1', '2', '05', '125'])}"
        return f"0.{self.rng.randint(1, 99):02d}"

    # --- facts

    def value(self, kind: str) -> str:
        r = self.rng
        match kind:
            case "name":
                return self.name()
            case "date":
                day, month = r.randint(1, 31), r.choice(ph.MONTHS)
                form = r.choice(["{d} {m}", "{m} {d}", "the {d}th of {m}", "{d} {m} 19{y}", "{d}.{n}.", "in {m}"])
                return form.format(d=day, m=month, y=r.randint(50, 99), n=r.randint(1, 12))
            case "phone":
                return r.choice(["0", "+", ""]) + "".join(r.choice("0123456789") for _ in range(r.randint(5, 11)))
            case "colour":
                return r.choice(ph.COLOURS)
            case "code":
                return self.code()
            case "number":
                return self.number(9999)
            case "address":
                return f"{r.randint(1, 199)} {self.word().capitalize()} {r.choice(['Street', 'Road', 'Lane'])}"
            case "email":
                return f"{self.name().lower()}@{self.word()}.{r.choice(['com', 'org', 'net', 'de'])}"
            case "city":
                return self.city()
            case "when":
                forms = ["on {d}", "at {t}", "on {d} at {t}", "{d} at {t}", "in {m}", "at {t} on {d}", "next {d}"]
                form = r.choice(forms)
                return form.format(d=r.choice(ph.DAYS[:7]), t=self.time(), m=r.choice(ph.MONTHS))
            case "where":
                where = r.choice(["under", "in", "behind", "on", "next to"])
                form = f"{where} the {{w}}" if self.chance(0.85) else "in {c}"
                return form.format(w=self.words(1, 2), c=self.city())
            case "words":
                return self.words(1, 3)
        return self.word()

    def owner(self) -> str:
        return self.rng.choice(ph.OWNERS) if self.chance(0.6) else f"{self.name()}'s"

    def fact(self) -> tuple[str, str, str]:
        """A note, the beginning of a question about it, and what the question is about."""
        style = self.rng.random()
        if style < 0.4:
            attribute, kind = self.pick(ph.ATTRIBUTES, ph.ATTRIBUTES_HELD)
            if self.chance(0.12):
                attribute, kind = self.word(), self.rng.choice(["word", "name", "number", "code", "colour", "words"])
            subject = f"{self.owner()} {attribute}"
            if self.chance(0.1):
                subject = f"the {attribute} of {self.name()}"
        elif style < 0.65:
            subject, kind = self.pick(ph.SUBJECTS, ph.SUBJECTS_HELD)
            if self.chance(0.2):
                subject, kind = f"the {self.words(1, 2)}", self.rng.choice(["word", "where", "when", "code", "words"])
        else:
            form, begin, topic = self.choose(ph.SENTENCES)
            w, day = self.word(), self.rng.choice(ph.DAYS)
            slots = {"n": self.name(), "o": self.name(), "w": w, "v": self.word(), "W": self.word().capitalize()}
            slots |= {"c": self.city(), "d": self.number(999), "m": self.rng.choice(ph.CURRENCY), "day": day}
            slots |= {"t": self.time()}
            note = self.say(form, polite=False, strange=False, slots=slots)
            return note, begin, self.say(topic, polite=False, strange=False, slots=slots)
        verb = "is"
        if self.chance(0.05):
            verb = "was"
        value = self.value(kind)
        ask = {"name": "Who", "when": "When", "where": "Where", "date": "When"}.get(kind, "What")
        if self.chance(0.4) or " name" in subject:
            ask = "What"
        return f"{subject} {verb} {value}", f"{ask} is" if self.chance(0.85) else f"{ask}'s", subject

    def named_fact(self) -> tuple[str, str]:
        """A note of the form "X is Y", and X."""
        while True:
            note, _, topic = self.fact()
            if note.startswith((f"{topic} is ", f"{topic} was ")):
                return note, topic

    def distractors(self, topic: str) -> list[str]:
        """Other notes, none of which could be mistaken for the one about the topic."""
        notes = [self.fact()[0] for _ in range(self.rng.choice([0, 0, 1, 2, 3]))]
        taken = {w for w in re.findall(r"\w+", topic.lower()) if len(w) > 2}
        return [n for n in notes if not taken & set(re.findall(r"\w+", n.lower()))]

    def valued_fact(self) -> tuple[str, str, str]:
        """A note with one number in it, its topic, and the number."""
        topic = str(self.pick(ph.AMOUNTS, ph.AMOUNTS_HELD))
        if self.chance(0.15):
            topic = f"the {self.words(1, 2)}"
        elif self.chance(0.15):
            topic = f"{self.name()}'s {self.rng.choice('age score weight salary rent budget share'.split())}"
        number = self.number(99_999)
        if self.chance(0.3):
            slots = {"q": topic, "d": number, "m": self.rng.choice(ph.CURRENCY), "n": self.name(), "w": self.word()}
            note, about = self.choose(ph.VALUED)
            return (
                self.say(note, polite=False, strange=False, slots=slots),
                self.say(about, polite=False, strange=False, slots=slots),
                number,
            )
        unit = f" {self.rng.choice([*ph.CURRENCY, 'km', 'kg', 'metres', 'hours'])}" if self.chance(0.35) else ""
        return f"{topic} is {number}{unit}", topic, number

    def text(self) -> str:
        """Something to write into a file."""
        r = self.rng
        style = r.random()
        if style < 0.25:
            text = self.words(1, 3)
        elif style < 0.5:
            text = self.words(3, 7)
        elif style < 0.62:
            text = self.fact()[0]
        elif style < 0.7:
            text = ", ".join(self.words(1, 2) for _ in range(r.randint(2, 5)))
        elif style < 0.78:
            text = self.number()
        elif style < 0.84:
            text = self.code()
        elif style < 0.9:
            text = f"{self.words(1, 3)}{r.choice([': ', ' = ', ' - ', ' '])}{self.number(99999)}"
        elif style < 0.95:
            joint = r.choice(["at", "for", "to", "in", "and", "with", "or", "&", "+"])
            text = f"{self.words(2, 5)} {joint} {self.words(1, 4)}"
        else:
            text = f"{self.name()} {r.choice(['was here', 'says hi', 'loves', 'and', 'is'])} {self.name()}"
        if not self.held and self.chance(0.06):  # a text to write may begin with a greeting
            text = f"{self.phrase(ph.SMALL_TALK[r.choice(list(ph.SMALL_TALK))]).rstrip('!.?')} {text}"
        if self.chance(0.25):
            text = text[0].upper() + text[1:]
        return text + r.choice(["", "", "", "", "", "", "!", "?"])

    def contents(self) -> str:
        """The text of a file, sometimes of several lines."""
        lines = self.rng.choices([1, 2, 3, 4], [82, 10, 6, 2])[0]
        texts = [self.text() + self.rng.choice(["", "", "."]) for _ in range(lines)]
        return "\n".join(f"- {t}" if lines > 1 and self.chance(0.2) else t for t in texts)

    def numbered(self) -> tuple[str, str]:
        """A file with one number in it, and the number."""
        number = self.amount()
        if self.chance(0.7):
            return number, number
        label = self.words(1, 2)
        form = self.rng.choice(["{l}: {n}", "{l} = {n}", "{n} {l}", "the {l} is {n}"])
        return form.format(l=label, n=number), number

    # --- arithmetic

    def expression(self, short: bool = False) -> tuple[str, str, bool]:
        """Arithmetic in signs or words, the expression for calc, and whether it is an order ("add 1 and 2")."""
        style = self.rng.random()
        numbers = {k: self.amount() for k in "abc"} | {"k": self.number(60)}
        if style < 0.5 or (short and style < 0.7):
            formula = self._signs()
            return formula, formula, False
        order = style > 0.85 and not short
        said, formula = self.choose(ph.ORDERS if order else ph.WORDED)
        if "**" in formula:
            numbers = {"a": self.number(999), "k": str(self.rng.randint(2, 9))}
        if not self.held and self.chance(0.03):
            numbers |= {k: NUMBER_WORDS[int(v) % 12 + 1] if v.isdigit() else v for k, v in numbers.items()}
        spelled = self.say(said, polite=False, strange=False, slots=numbers)
        digits = {k: str(NUMBER_WORDS.index(v)) if v in NUMBER_WORDS else v for k, v in numbers.items()}
        return spelled, self.say(formula, polite=False, strange=False, slots=digits), order

    def _signs(self) -> str:
        """An expression in signs, which is copied unchanged."""
        r = self.rng
        a, b, c, d = (self.amount() for _ in range(4))
        signs = "+-*/" if self.chance(0.8) else "×÷x*"
        o, p, q = r.choice(signs), r.choice("+-*/"), r.choice("+-*/")
        form = r.choices(list(SIGNS), list(SIGNS.values()))[0]
        if "k" in form:
            a = self.number(99)
        text = form.format(a=a, b=b, c=c, d=d, o=o, p=p, q=q, k=r.randint(2, 9))
        if self.chance(0.04):
            text = text.replace(a, f"{int(float(a)) + 1000:,}", 1)
        return text.replace(" ", "") if self.chance(0.25) else text

    def problem(self) -> tuple[str, str]:
        """A word problem and its expression."""
        r = self.rng
        said, formula = self.choose(ph.PROBLEMS)
        big = 10 ** r.choice([2, 2, 3, 3, 4])
        a, b, c, d = (int(self.number(big)) for _ in range(4))
        if "{a} - {b}" in formula:
            a, b = max(a, b), min(a, b)
        if "{a} / {b}" in formula and self.chance(0.6) and not self.held:
            b = b % 40 + 1
            a = self._whole(a * b) // b * b or b
        numbers = {"a": str(a), "b": str(b), "c": str(c), "d": str(d), "z": str(a * b + c), "k": self.number(60)}
        if "{m}" in said and self.chance(0.2):
            numbers["b"] += r.choice([".50", ".25", ".99", ".5"])
        small = {k: int(v) for k, v in numbers.items() if v.isdigit() and int(v) <= 12 and self.chance(0.2)}
        words = {k: NUMBER_WORDS[v] for k, v in small.items()}
        slots = numbers | words
        slots |= {"B": slots["b"].capitalize(), "n": self.name(), "o": self.name(), "p": self.name()}
        slots |= {"t": self.thing(), "s": self.thing(), "C": self.pick(ph.CONTAINERS, ph.CONTAINERS_HELD)}
        slots |= {"m": r.choice(ph.CURRENCY), "day": r.choice(ph.DAYS)}
        return self.say(said, strange=False, slots=slots), self.say(formula, polite=False, strange=False, slots=numbers)

    @staticmethod
    def _whole(n: int) -> int:
        while any(low <= n <= high for low, high in HELD_RANGES):
            n += 10_000
        return n

    def thing(self) -> str:
        return self.made_up() + "s" if self.chance(0.12) else str(self.pick(ph.THINGS, ph.THINGS_HELD))

    def joint(self) -> str:
        return self.phrase(ph.JOIN)


SIGNS = {
    "{a} {o} {b}": 80,
    "{a} {o} {b} {p} {c}": 10,
    "({a} {o} {b}) {p} {c}": 7,
    "{a} {o} ({b} {p} {c})": 7,
    "{a} {o} {b} {p} {c} {q} {d}": 3,
    "({a} {o} {b}) {p} ({c} {q} {d})": 3,
    "(({a} {o} {b}) {p} {c}) {q} {d}": 1,
    "-{a} {o} {b}": 1,
    "{a} {o} -{b}": 1,
    "{a}^{k}": 1,
    "{a} ** {k}": 1,
    "{a}**{k}": 1,
    "sqrt({a})": 1,
}
PIECES = [p for p in (token.decode("latin-1") for token in load().tokens) if re.fullmatch("[a-z]{2,6}", p)]
HELD_WORDS = {
    word
    for name, words in vars(ph).items()
    if name.endswith("_HELD")
    for item in words
    for word in re.findall("[a-z]+", str(item).lower())
}
HELD_RANGES = [(40, 44), (80, 84), (300, 349), (7200, 7499), (61_000, 61_999), (500_000, 509_999)]
ORDERS_TO_REMEMBER = [p for p in ph.REMEMBER if p[0].islower()]
CLAUSES = [c for c in ph.CALC if "{e}" in c]
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _is_held(number: int) -> bool:
    return any(low <= number <= high for low, high in HELD_RANGES)


# --- one function per family ----------------------------------------------------------------------


def result(value: str) -> tuple[str, list[str]]:
    return f"The answer is {value}.", [value]


def calc(s: PhraseSource) -> Task:
    if s.chance(0.45):
        said, formula = s.problem()
        return Task("calc", said, lambda do: result(do("calc", expression=formula)))
    said, formula, order = s.expression()
    form = s.choose(ph.CALC)
    prompt = _wrapped(s, said) if order else s.say(form, e=said, E=said[0].upper() + said[1:])
    return Task("calc", prompt, lambda do: result(do("calc", expression=formula)))


def remember(s: PhraseSource) -> Task:
    note = s.fact()[0] if s.chance(0.8) else s.valued_fact()[0]
    if s.chance(0.07):
        note += s.rng.choice([" and ", ", "]) + s.fact()[0]
    prompt = s.say(s.choose(ph.REMEMBER), x=note, X=note)

    def solution(do: Do) -> tuple[str, list[str]]:
        do("remember", text=note)
        return "I will remember it.", []

    return Task("remember", prompt, solution)


def question(s: PhraseSource, note: str, begin: str, topic: str) -> tuple[str, str]:
    """A question about a note, and the query for it."""
    template = s.choose(ph.RECALL)
    if (
        not note.startswith(topic) and "{wh}" not in template and "{wi}" not in template
    ):  # a sentence: ask about its subject
        subject = re.match(r"the \w+|[A-Z]\w+", note)
        topic = subject[0] if subject else topic
        while not subject and "{wh}" not in template and "{wi}" not in template:
            template = s.choose(ph.RECALL)
    wh, _, auxiliary = begin.partition(" ")
    if "'s" in begin:
        wh, auxiliary = begin.split("'")[0], "is"
    indirect = wh.lower()
    if begin.startswith("How "):
        indirect = begin.rpartition(" ")[0].lower()
    tail = f" {auxiliary}" if auxiliary in ("is", "are", "was") else ""  # "where the key is"
    ask = begin if template.startswith("{wh}") else begin[0].lower() + begin[1:]
    return s.say(template, wh=ask, wi=indirect, q=topic, Q=topic, tail=tail), topic


def recall(s: PhraseSource) -> Task:
    style = s.rng.random()
    if style < 0.08:
        notes = [s.fact()[0] for _ in range(s.rng.randint(0, 4))]
        prompt = s.say(s.choose(ph.RECALL_ALL))
        query = "everything"
    elif style < 0.2:
        slots = {"n": s.name(), "c": s.city(), "w": s.word(), "v": s.word(), "W": s.made_up().capitalize()}
        template = s.choose(ph.UNKNOWN)
        prompt, notes = s.say(template, slots=slots), []
        topic = re.sub(r"^(?:Where can|\w+('s| old is| is| does| did|)) ", "", template).rstrip("?")
        query = s.say(topic, polite=False, strange=False, slots=slots)
    else:
        note, begin, topic = s.fact()
        if s.chance(0.2):
            (note, topic, _), begin = s.valued_fact(), s.rng.choice(["What is", "How much is", "What's"])
        prompt, query = question(s, note, begin, topic)
        notes = [*s.distractors(topic), note]
        s.rng.shuffle(notes)
        if s.chance(0.08):
            notes = []

    def solution(do: Do) -> tuple[str, list[str]]:
        found = do("recall", query=query)
        return f"You told me: {found}", found.split("\n")

    return Task("recall", prompt, solution, notes=notes)


def read(s: PhraseSource) -> Task:
    path = s.file()
    prompt = s.say(s.choose(ph.READ), f=s.quoted(path))
    if s.chance(0.08):
        bad = s.rng.choice(["../", "../../", "/etc/"]) + path if s.chance(0.2) else path
        prompt = prompt.replace(path, bad)
        return Task("read", prompt, lambda do: (do("read_file", path=bad), []))

    def solution(do: Do) -> tuple[str, list[str]]:
        contents = do("read_file", path=path)
        return f"{path} says: {contents}", [contents]

    return Task("read", prompt, solution, {path: s.contents() + "\n"})


def write_request(s: PhraseSource) -> tuple[str, str, str]:
    text, path = s.text(), s.file()
    style = s.rng.random()
    said = text
    if style < 0.3:
        quote = s.rng.choice(["'", '"', '"', "“"])
        if quote not in text:
            said = quote + text + {"“": "”"}.get(quote, quote)
    elif said.endswith(("?", "!")):
        text = said = text[:-1]
    template = s.phrase(ph.WRITE)
    return template.replace("{x}", said).replace("{f}", s.quoted(path)), path, text


def write(s: PhraseSource) -> Task:
    said, path, text = write_request(s)
    prompt = _wrapped(s, said)

    def solution(do: Do) -> tuple[str, list[str]]:
        do("write_file", path=path, content=text)
        return f"I wrote it to {path}.", []

    return Task("write", prompt, solution)


def _wrapped(s: PhraseSource, said: str) -> str:
    """A request whose slots are filled already, with polite words and sloppy spelling added."""
    if said[:1].islower():
        return s.say("x{e}", e=said).replace("x" + said, said).replace("X" + said, said[0].upper() + said[1:])
    return s.say("X{e}", e=said).replace("x" + said, said).replace("X" + said, said)


def talk(s: PhraseSource) -> Task:
    answer = s.rng.choices(list(ph.SMALL_TALK), [3, 2, 2, 2, 4])[0]
    said = s.choose(ph.SMALL_TALK[answer])
    if not s.held and "I am" not in answer and s.chance(0.25):  # "hello", followed by words without meaning
        said = f"{said.rstrip('!.?')} {s.words(1, 2)}"
    prompt = s._sloppy(said)
    musts = ["help" if "help" in answer else "calculate" if "calculate" in answer else answer.split()[-1]]
    return Task("talk", prompt, lambda do: (answer, musts))


def cannot(s: PhraseSource) -> Task:
    slots = {"n": s.name(), "c": s.city(), "w": s.word(), "t": s.time(), "d": s.number(99)}
    slots |= {"day": s.rng.choice(ph.DAYS)}
    slots |= {"f": s.file(), "g": s.file(), "x": s.words(2, 4), "m": s.rng.choice(ph.CURRENCY)}
    prompt = s.say(s.choose(ph.CANNOT), slots=slots)
    return Task("cannot", prompt, lambda do: (ph.CANNOT_ANSWER, ["cannot"]))


# Chains: the first clause says how to get a value, the second what to do with the result.


def value_step(s: PhraseSource, kinds: str) -> tuple[str, str, Callable[[Do], str], dict[str, str], list[str]]:
    """A request for a number: its words, its kind, the program that gets the number, files and notes."""
    files: dict[str, str] = {}
    notes: list[str] = []
    kind = s.rng.choice(kinds.split())
    if kind == "calc":
        if s.chance(0.25):
            said, formula = s.problem()
            return said.strip(), kind, lambda do: do("calc", expression=formula), files, notes
        said, formula, order = s.expression(short=s.chance(0.7))
        if not order:
            said = s.say(s.choose(CLAUSES), polite=False, e=said)
        return said, kind, lambda do: do("calc", expression=formula), files, notes

    if kind in ("read", "recall"):
        template, formula = s.choose(ph.ON_VALUE)
        k = s.number(999) if s.chance(0.8) else s.amount()
        j = s.number(99)
        if kind == "read":
            path = s.file()
            contents, number = s.numbered()
            files[path] = contents + "\n"
            value = s.phrase(ph.FILE_VALUE).replace("{f}", s.quoted(path))
            if template[0].islower() and "[" not in template and s.chance(0.4):
                reader = s.spell_out(f"[read|open|look into|check|take] {s.quoted(path)}[ and|, then|,]")
                template, value = f"{reader} {template}", s.rng.choice(ph.THEN_IT)
            first: tuple[str, dict[str, str]] = ("read_file", {"path": path})
        else:
            note, topic, number = s.valued_fact()
            notes += [*s.distractors(topic), note]
            s.rng.shuffle(notes)
            value = topic
            if template[0].islower() and "[" not in template and s.chance(0.4):
                reader = s.spell_out(f"[look up|recall|find|remember|check] {topic}[ in your notes|][ and|, then|,]")
                template, value = f"{reader} {template}", s.rng.choice(ph.THEN_IT[:4])
            first = ("recall", {"query": topic})
        said = s.say(template, polite=False, strange=False, v=value, k=k, j=j)
        formula = s.say(formula, polite=False, strange=False, N=number, k=k, j=j)

        def one(do: Do) -> str:
            do(first[0], **first[1])
            return do("calc", expression=formula)

        return said, kind, one, files, notes

    if kind == "list":
        template, sign = s.choose(ph.LISTS)
        path = s.file()
        numbers = [s.number(9999) for _ in range(s.rng.randint(2, 4))]
        files[path] = s.rng.choice([", ", "\n", " ", ","]).join(numbers) + "\n"
        formula = f" {sign} ".join(numbers)
        if s.chance(0.15):
            template, formula = s.choose(ph.AVERAGES), f"({' + '.join(numbers)}) / {len(numbers)}"

        def listed(do: Do) -> str:
            do("read_file", path=path)
            return do("calc", expression=formula)

        return s.say(template, polite=False, strange=False, f=s.quoted(path)), kind, listed, files, notes

    assert kind in ("read2", "recall2", "mixed")
    values, steps, numbers = [], [], []
    for part in {"read2": ["read", "read"], "recall2": ["recall", "recall"], "mixed": ["read", "recall"]}[kind]:
        if part == "read":
            path = s.file()
            contents, number = s.numbered()
            files[path] = contents + "\n"
            values.append(s.phrase(ph.FILE_VALUE).replace("{f}", s.quoted(path)))
            steps.append(("read_file", {"path": path}))
        else:
            note, topic, number = s.valued_fact()
            while any(set(topic.lower().split()) - {"the"} & set(n.lower().split()) - {"the"} for n in notes):
                note, topic, number = s.valued_fact()
                topic = f"the {s.made_up()} {s.word()}" if s.chance(0.5) else topic
                note = f"{topic} is {number}"
            notes.append(note)
            values.append(topic)
            steps.append(("recall", {"query": topic}))
        numbers.append(number)
    if s.chance(0.5):
        values, steps, numbers = values[::-1], steps[::-1], numbers[::-1]
    if kind == "read2" and s.chance(0.4):
        paths = [arguments["path"] for _, arguments in steps]
        many = s.spell_out("[the numbers|the values|both numbers] [in|from] {f} and {g}")
        template, sign = s.choose(ph.BOTH)
        template = s.spell_out(template).replace("{any}", s.word())
        said = template.replace("{v}", many).replace("{f}", s.quoted(paths[0])).replace("{g}", s.quoted(paths[1]))
        formula = f"{numbers[0]} {sign} {numbers[1]}"
    else:
        template, formula = s.choose(ph.ON_TWO)
        said = s.say(template, polite=False, strange=False, v=values[0], w=values[1])
        formula = s.say(formula, polite=False, strange=False, N=numbers[0], M=numbers[1])

    def two(do: Do) -> str:
        for tool, arguments in steps:
            do(tool, **arguments)
        return do("calc", expression=formula)

    return said, kind, two, files, notes


def follow_up(s: PhraseSource, kinds: str) -> tuple[str, Callable[[Do, str], str]]:
    """An order to keep a result, and the program for it, which returns a sentence for the answer."""
    if s.rng.choice(kinds.split()) == "save":
        path = s.file()

        def save(do: Do, value: str) -> str:
            do("write_file", path=path, content=value)
            return f"I wrote it to {path}."

        return s.say(s.choose(ph.SAVE), polite=False, f=s.quoted(path)), save
    template, note = s.choose(ph.KEEP)
    label = s.rng.choice([*ph.AMOUNTS[:-20], *["the total", "the sum", "my share", "the price"] * 8])
    if s.chance(0.3):
        label = f"{s.rng.choice(['the', 'my'])} {s.words(1, 2)}"

    def keep(do: Do, value: str) -> str:
        do("remember", text=note.replace("{l}", label).replace("{R}", value))
        return "I will remember it."

    return s.say(template, polite=False, l=label), keep


def _join(s: PhraseSource, parts: list[str]) -> str:
    """Join clauses: "work out 3 * 4, then save it to a.txt"."""
    said = parts[0]
    for part in parts[1:]:
        joint = s.joint()
        if said[-1] in ".?":
            joint = s.rng.choice([" ", " Then ", " And then ", " And ", " After that, ", " Please ", " Now "])
            if joint in (" ", " Please "):
                part = part if joint == " Please " else part[0].upper() + part[1:]
        said += joint + part
    return said


def chain(name: str, kinds: str, follow: list[str]) -> Callable[[PhraseSource], Task]:
    """A family: get a number in one of the ways of `kinds`, then do what `follow` says."""

    def family(s: PhraseSource) -> Task:
        said, _, get, files, notes = value_step(s, kinds)
        follows = [follow_up(s, f) for f in follow]
        if s.chance(0.05):  # the file or note does not exist
            files, notes = {}, []
        prompt = _wrapped(s, _join(s, [said, *(f[0] for f in follows)]))

        def solution(do: Do) -> tuple[str, list[str]]:
            value = get(do)
            done = [f[1](do, value) for f in follows]
            return " ".join([f"The answer is {value}.", *done]), [value]

        return Task(name, prompt, solution, files, notes)

    return family


def keep_and_save(s: PhraseSource) -> Task:
    return chain("calc, keep, save", "calc", s.rng.choice([["keep", "save"], ["save", "keep"]]))(s)


def move(s: PhraseSource) -> Task:
    """Copy a text from one place to another, unchanged: two calls."""
    kind = s.rng.choice(["copy", "copy", "read_keep", "recall_save", "keep_save", "write_read"])
    f, g, contents = s.file(), s.file(), s.contents() if s.chance(0.3) else s.text()
    if kind == "copy":
        prompt = s.say(s.choose(ph.COPY), f=s.quoted(f), g=s.quoted(g))
        if s.chance(0.1):
            return Task("move", prompt, lambda do: (do("read_file", path=f), []))

        def copy(do: Do) -> tuple[str, list[str]]:
            do("write_file", path=g, content=do("read_file", path=f))
            return f"I wrote it to {g}.", []

        return Task("move", prompt, copy, {f: contents + "\n"})
    if kind == "read_keep":
        contents = contents.split("\n")[0]
        prompt = s.say(s.choose(ph.READ_KEEP), f=s.quoted(f))

        def read_keep(do: Do) -> tuple[str, list[str]]:
            do("remember", text=do("read_file", path=f))
            return "I will remember it.", []

        return Task("move", prompt, read_keep, {f: contents + "\n"})
    note = s.fact()[0]
    if kind == "recall_save":
        note, topic = s.named_fact()
        prompt = s.say(s.choose(ph.RECALL_SAVE), q=topic, f=s.quoted(f))

        def recall_save(do: Do) -> tuple[str, list[str]]:
            do("write_file", path=f, content=do("recall", query=topic))
            return f"I wrote it to {f}.", []

        return Task("move", prompt, recall_save, notes=[*s.distractors(topic), note])
    if kind == "keep_save":
        order = s.spell_out("[[write|save|put] it [to|in|into] {f}".replace("[[", s.rng.choice(["[", "also ["])))
        order += s.rng.choice(["", "", " too", " as well"])
        said = s.say(s.choose(ORDERS_TO_REMEMBER), polite=False, x=note)
        prompt = _wrapped(s, _join(s, [said, order.replace("{f}", s.quoted(f))]))

        def keep_save(do: Do) -> tuple[str, list[str]]:
            do("remember", text=note)
            do("write_file", path=f, content=note)
            return f"I will remember it. I wrote it to {f}.", []

        return Task("move", prompt, keep_save)
    said, f, text = write_request(s)
    template = s.choose(ph.WRITE_READ)
    said = said.rstrip(".")
    said = template.replace("{wr}", said).replace("{j}", s.joint()).replace("{f}", f)
    prompt = _wrapped(s, said)

    def write_read(do: Do) -> tuple[str, list[str]]:
        do("write_file", path=f, content=text)
        back = do("read_file", path=f)
        return f"{f} says: {back}", [back]

    return Task("move", prompt, write_read)


def twice(s: PhraseSource) -> Task:
    """Call the same tool twice."""
    kind = s.rng.choice(["reads", "recalls", "calcs"])
    if kind == "reads":
        f, g, one, two = s.file(), s.file(), s.text(), s.text()
        prompt = s.say(s.choose(ph.TWO_READS), f=s.quoted(f), g=s.quoted(g))

        def reads(do: Do) -> tuple[str, list[str]]:
            first, second = do("read_file", path=f), do("read_file", path=g)
            return f"{f} says: {first}\n{g} says: {second}", [first, second]

        return Task("twice", prompt, reads, {f: one + "\n", g: two + "\n"})
    if kind == "recalls":
        note, q = s.named_fact()
        other, p = s.named_fact()
        while set(re.findall(r"\w{3,}", q.lower())) & set(re.findall(r"\w{3,}", p.lower())) - {"the"}:
            note, q = s.named_fact()
        prompt = s.say(s.choose(ph.TWO_RECALLS), q=q, p=p)

        def recalls(do: Do) -> tuple[str, list[str]]:
            first, second = do("recall", query=q), do("recall", query=p)
            return f"You told me: {first}\n{second}", [first, second]

        return Task("twice", prompt, recalls, notes=[note, other] if s.chance(0.5) else [other, note])
    (e, x, _), (g, y, _) = s.expression(short=True), s.expression(short=True)
    prompt = s.say(s.choose(ph.TWO_CALCS), e=e, g=g)

    def calcs(do: Do) -> tuple[str, list[str]]:
        first, second = do("calc", expression=x), do("calc", expression=y)
        return f"The answers are {first} and {second}.", [first, second]

    return Task("twice", prompt, calcs)


FAMILIES: dict[str, tuple[Callable[[PhraseSource], Task], float]] = {
    "calc": (calc, 16),
    "remember": (remember, 6),
    "recall": (recall, 7),
    "read": (read, 9),
    "write": (write, 12),
    "talk": (talk, 6),
    "cannot": (cannot, 7),
    "calc, then": (chain("calc, then", "calc", ["save keep save"]), 9),
    "fetch, calc": (chain("fetch, calc", "read recall list", []), 8),
    "move": (move, 12),
    "twice": (twice, 13),
    "fetch, calc, then": (chain("fetch, calc, then", "read recall list", ["save keep"]), 10),
    "calc, keep, save": (keep_and_save, 7),
    "fetch two, calc": (chain("fetch two, calc", "read2 recall2 mixed", []), 10),
    "fetch two, calc, then": (chain("fetch two, calc, then", "read2 recall2 mixed", ["save keep"]), 10),
}
