"""The words that recall text is made of: one set to train on and one to measure with, which share nothing.

A `Wording` is how a fact is stated and asked for. `{key}` and a word as `{value}` always follow a space, which
belongs to the word; a number follows the space that the sentence brings.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How facts of one task read.

    Attributes:
        task: "fact", "passkey", "needle", "phone_book", "pairs" or "copy".
        key: what `{key}` stands for: "name" (first name and surname), "word", or "" for a fact without a key.
        value: what `{value}` stands for: "digits", "word" or "words" (a list, to be copied).
        statement, question: the statement, and the question that ends with the answer.
    """

    task: str
    key: str
    value: str
    statement: str
    question: str


@dataclass(frozen=True)
class Words:
    """Names, nouns and wordings of one side, training or evaluation."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    nouns: tuple[str, ...]
    wordings: tuple[Wording, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _restated(task: str, key: str, value: str, statement: str, end: str = ".") -> Wording:
    """A wording whose question is the statement once more."""
    return Wording(task, key, value, f"\n\n{statement}{end}\n\n", f"\n\n{statement}")


TRAINING = Words(
    first=_words(
        """Adam Alice Amanda Andrew Angela Anna Arthur Barbara Benjamin Betty Brian Carl Carol Catherine Charles
        Christine Daniel David Deborah Dennis Diana Donald Dorothy Douglas Edward Elizabeth Emily Eric Eugene Frances
        Frank George Gerald Gloria Grace Gregory Harold Heather Helen Henry Howard Jack James Janet Jason Jean Jennifer
        Jerry Jessica Joan John Jonathan Joseph Joyce Julia Karen Keith Kenneth Kevin Kimberly Larry Laura Lawrence
        Linda Lisa Louis Margaret Maria Mark Martha Martin Mary Matthew Melissa Michael Nancy Nicole Pamela Patrick Paul
        Peter Philip Rachel Ralph Raymond Rebecca Richard Robert Roger Ronald Rose Russell Ruth Samuel Sandra Sarah
        Scott Sharon Stephen Susan Teresa Thomas Timothy Virginia Walter Wayne William"""
    ),
    last=_words(
        """Adams Allen Anderson Bailey Baker Barnes Bell Bennett Brooks Brown Bryant Burns Butler Campbell Carter Clark
        Coleman Collins Cook Cooper Cox Crawford Cruz Davis Diaz Edwards Ellis Evans Fisher Flores Ford Foster Freeman
        Garcia Gibson Gomez Gordon Graham Green Griffin Hall Hamilton Harris Harrison Hayes Henderson Hill Holmes
        Hughes Hunter Jackson Jenkins Johnson Jones Jordan Kelly Kennedy King Lee Lewis Long Lopez Marshall Mason
        Mcdonald Miller Mitchell Moore Morgan Morris Murphy Murray Myers Nelson Ortiz Owens Parker Patterson Perez Perry
        Peterson Phillips Powell Price Ramirez Reed Reynolds Rivera Roberts Robinson Rodriguez Rogers Ross Russell
        Sanchez Sanders Scott Shaw Simmons Smith Stevens Stewart Sullivan Taylor Thompson Torres Tucker
        Turner"""
    ),
    nouns=_words(
        """apple arrow autumn badge baker banner barrel basket beach bell berry bicycle blanket boat bottle bowl branch
        bread bridge brush bucket butter button cabin cable camera candle canyon carpet castle cattle cellar chain chair
        cherry chess circle clock cloud coast coffee copper corner cotton cradle crane cricket crystal curtain desert
        diamond doctor dolphin donkey dragon drawer drum eagle engine falcon farmer feather fence field finger flag
        flame flower forest fossil fountain garden gate giant glass glove goose grain grape guitar hammer harbor harvest
        hawk helmet honey horse hotel island jacket jewel jungle kettle kitchen kitten ladder lake lamp lantern leaf
        lemon library lion lizard lumber magnet maple market mask meadow medal melon metal mirror monkey moon mountain
        needle nest night oak ocean olive onion orange orchard otter owl paddle paint palace paper parrot pebble pencil
        pepper piano pigeon pillow pilot pine pirate planet plate pocket pond potato prince pumpkin puzzle rabbit radio
        railway rain raven ribbon rice river road robin rocket roof rope rose saddle sailor salmon salt sand scarf
        school seed shadow sheep shell shield ship shirt shoe signal silver singer smoke snow soap soldier spider
        spring squirrel stable star statue steam stone storm stove straw street sugar summer sword table tailor teacher
        temple tent thunder ticket tiger timber tower train tree trumpet turtle valley velvet village violin wagon wall
        water whale wheat wheel whistle window winter wolf wood wool yard zebra"""
    ),
    wordings=(
        _restated("fact", "name", "digits", "The secret code of {key} is {value}"),
        _restated("fact", "name", "digits", "The account number of {key} is {value}"),
        _restated("fact", "name", "digits", "According to the list, {key} has badge number {value}"),
        _restated("fact", "name", "digits", "The car of {key} is parked in space {value}"),
        Wording(
            "fact",
            "name",
            "digits",
            "\n\nThe flight of {key} has number {value}.\n\n",
            "\n\nQuestion: What is the flight number of {key}?\nAnswer: {value}",
        ),
        Wording(
            "fact",
            "name",
            "digits",
            "\n\nPlease note: {key} is staying in room {value}.\n\n",
            "\n\nWhich room is {key} staying in? The answer is {value}",
        ),
        _restated("fact", "name", "word", "The password of {key} is {value}"),
        _restated("fact", "name", "word", "The favorite thing of {key} is the {value}"),
        _restated("fact", "name", "word", "As everyone knows, {key} used to own a {value}"),
        Wording(
            "fact",
            "name",
            "word",
            "\n\nIn the game, {key} drew the {value}.\n\n",
            "\n\nQuestion: What did {key} draw?\nAnswer: the {value}",
        ),
        Wording(
            "passkey",
            "",
            "digits",
            "\n\nThe pass key is {value}. Remember it.\n\n",
            "\n\nWhat is the pass key? The pass key is {value}",
        ),
        Wording(
            "passkey",
            "",
            "digits",
            "\n\nDo not forget this number: {value}\n\n",
            "\n\nThe number that you were told not to forget: {value}",
        ),
        Wording(
            "passkey",
            "",
            "word",
            "\n\nThe word of the day is {value}.\n\n",
            "\n\nWhat is the word of the day? The word of the day is {value}",
        ),
        Wording(
            "needle",
            "word",
            "digits",
            "\n\nA hidden number for {key} is {value}.\n\n",
            "\n\nWhat is the hidden number for {key}? The hidden number for {key} is {value}",
        ),
        Wording(
            "needle",
            "word",
            "digits",
            "\n\nThe drawer with the {key} opens with {value}.\n\n",
            "\n\nHow does the drawer with the {key} open? It opens with {value}",
        ),
        Wording(
            "needle",
            "word",
            "word",
            "\n\nBehind the {key} there is a {value}.\n\n",
            "\n\nWhat is behind the {key}? Behind the {key} there is a {value}",
        ),
        Wording(
            "phone_book",
            "name",
            "digits",
            "\n- {key}: {value}",
            "\n\nThe telephone list says, for {key}: {value}",
        ),
        Wording("phone_book", "name", "digits", "\nName: {key}, phone: {value}", "\nName: {key}, phone: {value}"),
        Wording(
            "phone_book",
            "name",
            "digits",
            "\nCall {key} at {value}.",
            "\n\nTo reach her, call {key} at {value}",
        ),
        Wording("pairs", "word", "word", "\nThe {key} goes with the {value}.", "\nThe {key} goes with the {value}"),
        Wording("pairs", "word", "word", "\n* {key} -> {value}", "\n* {key} -> {value}"),
        Wording("pairs", "word", "digits", "\nItem: {key}, number {value}", "\nItem: {key}, number {value}"),
        _restated("copy", "name", "words", "The shopping list of {key} reads: {value}"),
        Wording("copy", "word", "words", "\n\nChapter {key}: {value}.\n\n", "\n\nAgain, chapter {key}: {value}"),
    ),
)

EVALUATION = Words(
    first=_words(
        """Albert Amy Bruce Clara Denise Edith Ethan Fiona Gary Hannah Irene Jacob Kyle Leonard Lucy Marie Nathan Oliver
        Paula Roy Ruby Sean Sophia Stanley Sylvia Tyler Vincent Wendy"""
    ),
    last=_words(
        """Alexander Armstrong Boyd Bradley Carpenter Chapman Crosby Duncan Elliott Fletcher Fox Gilbert Hawkins Howell
        Lambert Lawson Mcbride Newman Palmer Porter Richards Spencer Nash Wallace Warren Watson Webb Young"""
    ),
    nouns=_words(
        """acorn anchor ballet beetle biscuit bonfire bronze cactus canvas carrot cedar chapel chimney clover compass
        coral cottage crown dagger daisy elephant emerald ferry fiddle flute fox frost geese goat gravel hazel hedge
        ivory ivy kite leather marble mitten mustard nickel oyster panther peach pearl penguin plum quilt ruby satin
        shovel spoon sunset swan tulip turnip umbrella vase walnut wax willow"""
    ),
    wordings=(
        _restated("fact", "name", "digits", "The locker combination of {key} is {value}"),
        _restated("fact", "name", "word", "The lucky charm of {key} is the {value}"),
        Wording(
            "passkey",
            "",
            "digits",
            "\n\nHere is the combination of the safe: {value}. Keep it in mind.\n\n",
            "\n\nWhich combination opens the safe? The safe opens with {value}",
        ),
        Wording(
            "needle",
            "word",
            "digits",
            "\n\nOne of the special magic numbers for {key} is {value}.\n\n",
            "\n\nWhat is the special magic number for {key} mentioned in the text? "
            "The special magic number for {key} mentioned in the text is {value}",
        ),
        Wording(
            "phone_book",
            "name",
            "digits",
            "\nDirectory entry: {key}, extension {value}",
            "\nDirectory entry: {key}, extension {value}",
        ),
        Wording("pairs", "word", "word", "\nIf you see {key}, say {value}.", "\nIf you see {key}, say {value}"),
        Wording(
            "copy",
            "name",
            "words",
            "\n\nThe poem by {key} begins: {value}.\n\n",
            "\n\nOnce more, the poem by {key} begins: {value}",
        ),
    ),
)
