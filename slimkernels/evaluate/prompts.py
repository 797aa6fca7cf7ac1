"""Worked examples for few-shot prompts: each answer has one step per line and announces its result on the last line."""

from __future__ import annotations

SHOTS: dict[str, tuple[tuple[str, str], ...]] = {
    "gsm8k": (
        (
            "A baker has 24 rolls. He sells 9 in the morning and bakes 12 at noon. How many rolls does he have now?",
            "After the morning he has 24 - 9 = 15 rolls.\nWith those from noon he has 15 + 12 = 27 rolls.\n"
            "The answer is 27.",
        ),
        (
            "Nina buys 3 notebooks for $4 each and a pen for $2. She pays with a $20 note. How many dollars does she "
            "get back?",
            "The notebooks cost 3 * 4 = 12 dollars.\nWith the pen she pays 12 + 2 = 14 dollars.\n"
            "She gets back 20 - 14 = 6 dollars.\nThe answer is 6.",
        ),
        (
            "A train covers 180 miles in 3 hours. How many miles does it cover in 5 hours at the same speed?",
            "In one hour it covers 180 / 3 = 60 miles.\nIn 5 hours it covers 60 * 5 = 300 miles.\nThe answer is 300.",
        ),
    ),
    "strategyqa": (
        (
            "Could a blue whale fit into a school swimming pool?",
            "A blue whale is about 25 metres long and 4 metres wide.\nA school pool is about 25 metres long, but only "
            "1 to 2 metres deep.\nA whale of that height does not fit into it.\nThe answer is no.",
        ),
        (
            "Can people see the Moon during the day?",
            "The Moon shines with the light of the Sun.\nIt is often above the horizon by day, and bright enough to be "
            "seen.\nThe answer is yes.",
        ),
        (
            "Did Mozart compose on an electric piano?",
            "Mozart died in 1791.\nElectric pianos were invented in the twentieth century.\nThe answer is no.",
        ),
    ),
    "commonsenseqa": (
        (
            "Where would you put a book that you want to read before you sleep?\n(A) kitchen\n(B) bedside table\n"
            "(C) river\n(D) garage\n(E) mailbox",
            "People read before they sleep in bed.\nThe book should be within reach of the bed.\nThe answer is (B).",
        ),
        (
            "What do people use to stay dry when it rains?\n(A) umbrella\n(B) fork\n(C) lamp\n(D) pillow\n(E) stamp",
            "Rain falls from above.\nAn umbrella is held above the head and keeps it off.\nThe answer is (A).",
        ),
        (
            "If a plant gets no water, what will it do?\n(A) sing\n(B) grow\n(C) bloom\n(D) wilt\n(E) travel",
            "Plants need water to live.\nWithout it their leaves hang down.\nThe answer is (D).",
        ),
    ),
}
