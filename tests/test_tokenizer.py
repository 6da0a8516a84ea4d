"""The scorer's words are those of the Java program that the COCO scorer runs."""

import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from util import tokenizer
from util.tokenizer import CONTRACTIONS, tokenize
from vocabulary import split_words

# Each caption as the Java tokeniser of the COCO scorer cuts it (CoreNLP 3.4.1, punctuation out).
WORDS = {
    "": "",
    " \n\t ": "",
    "A dog runs .": "a dog runs",
    "two\nlines": "two lines",
    "A boy's toy doesn't fit, so they've left.": "a boy 's toy does n't fit so they 've left",
    "A DOG DOESN'T CARE; THEY'RE ASLEEP!": "a dog does n't care they 're asleep",
    "He cannot go; he's gonna wanna rest.": "he can not go he 's gon na wan na rest",
    "cannots can-not 'tis ain't won't": "cannots can-not 't is ai n't wo n't",
    "it 's the dogs ' bowl, do n't": "it 's the dogs bowl do n't",
    "A t-shirt for $5, 50% off 1,000 hats": "a t-shirt for $ 5 50 % off 1,000 hats",
    "The U.S. flag at 10:30 a.m. in D.C.": "the u.s. flag at 10:30 a.m. in d.c.",
    "Mr. Smith, St. Bernard dogs, etc.": "mr. smith st. bernard dogs etc.",
    "Jersey No. 5, no. five": "jersey no. 5 no five",
    "plan B. The dog; plan B. the dog": "plan b the dog plan b. the dog",
    "A sign: \"Stop\" and 'go' ...": "a sign stop and go",
    "It’s a “quoted” ‘word’ — café…": "it 's a quoted word café",
    "and/or (left) [sic] {x}": "and/or -lrb- left -rrb- -lsb- sic -rsb- -lcb- x -rcb-",
    "dogs -- cats - fish – eels": "dogs cats fish eels",
    "one.two three,four five;six": "one.two three four five six",
    "rock 'n' roll at 5 o'clock, y'all, ma'am": "rock 'n' roll at 5 o'clock y' all ma'am",
    "O'Brien's '80s style, 80's": "o'brien 's '80s style 80 's",
    "R&B, AT&T, salt & pepper &amp; b&w": "r&b at&t salt & pepper & b & w",
    "what?! no!! oh! #1 #tag @user": "what ?! no !! oh # 1 #tag @user",
    "a 5-year-old's half-pipe, semi- pro": "a 5-year-old 's half-pipe semi pro",
    "1/2 24/7 3.5 -5 .5 1950s mp3 4x4": "1/2 24/7 3.5 -5 .5 1950s mp3 4x4",
    "5km 10mph 3.5km 5'10\" ½ 5°": "5km 10mph 3.5 km 5 10 1/2 5 °",
    "£5 €5 5¢ US$10": "# 5 $ 5 5 cents us$ 10",
    "me@example.com or www.test.org. or http://a.b/c?d=e, x.com": (
        "me@example.com or www.test.org or http://a.b/c?d=e x.com"
    ),
    "a smile :) a + b = * ~ ^ | \\ <b>": "a smile :-rrb- a + b = * ~ ^ | \\ <b>",
    "Zürich jalapeño naïve-looking Ångström": "zürich jalapeño naïve-looking ångström",
    "狗 在 跑步。 собака бежит, कुत्ता दौड़ता है": "狗 在 跑步 。 собака бежит कुत्ता दौड़ता है",
    "강아지 犬が走る، كلب يجري עברית": "강아지 犬が走る ، كلب يجري עברית",
    "a dog 🐶 ❤ runs": "a dog ❤ runs",
    "best day ❤️, 1️⃣ dog 👩‍👧": "best day ❤ 1 dog",
    "co\u200boperate می\u200cخواهم \ufeffa \u200fكلب, a \u2060 b": (
        "co operate می خواهم a كلب a b"
    ),
    "a_b snake_case img_2051": "a_b snake_case img_2051",
    "couldn't've, he'd've, bird's-eye-view, men's/women's": (
        "could n't 've he 'd 've bird 's eye-view men 's / women 's"
    ),
    "boys'team play at the'x factor'show": "boys team play at the x factor show",
    "'tis 'til '99 the '90s, Slip 'n Slide": "'t is 'til '99 the '90s slip 'n slide",
    "Rock'n'roll, fruit'n nuts, c'mon, s'mores, ol' dog": (
        "rock 'n' roll fruit 'n nuts c'mon s'mores ol' dog"
    ),
    "a 1-1/2 inch 12/25/2010 dog/cat/bird/fish a / b": (
        "a 1-1/2 inch 12/25/2010 dog/cat/bird / fish a / b"
    ),
    "Hawai'i and Xi'an, L'Oreal, d'Artagnan, N'Sync": "hawai'i and xi'an l'oreal d'artagnan n'sync",
    "A shop on Sunset Blvd. It sells Dr. Pepper.": "a shop on sunset blvd. it sells dr. pepper",
    "an office space. one is a lap top..": "an office space one is a lap top",
    "Washington, D.C., in the U.S.-based A.J.'s": "washington d.c. in the u.s.-based a.j. 's",
    "No.5 at 5p.m. is v2.0, Fig. 2": "no. 5 at 5p m. is v2 .0 fig. 2",
    "Miss. and miss. the bus, Mass. end": "miss. and miss the bus mass. end",
    "dog--cat dog–cat dog... cat dog…": "dog cat dog cat dog cat dog",
    "walkie- talkie -dog half-": "walkie talkie dog half",
    "2+2=4, 5+, +5, a=b": "2 +2 = 4 5 + +5 a = b",
    "lego® Coke™ 90º 10² H₂O": "lego ® coke ™ 90º 10 ² h ₂ o",
    "three 12-oz. cans, 3.5M, $1.50, 99¢, ±5": "three 12-oz cans 3.5 m $ 1.50 99 cents ± 5",
    "stop!now Yahoo! (dog!) \"dog.\", 'stop'": "stop!now yahoo -lrb- dog -rrb- dog stop",
    "don`t dog`s `stop' ``stop''": "do n`t dog s stop stop",
    "an A&W, M&M's, Ben & Jerry's": "an a&w m&m 's ben & jerry 's",
}

# Put into sentences and compared with Java where it is installed.
FRAGMENTS = """
    dog's dogs' it's They're don't DON'T won't isn't y'all ma'am o'clock O'Brien 'em 'til '80s 80's
    1950s '99 gonna Gotta lemme wanna Mr. St. U.S. a.m. 10am etc. e.g. Inc. Ave. Ph.D. No.5 #5 1,000
    1/2 1.5 .5 -5 24/7 3-year-old 10:30 50% $5 $1.50 US$10 €5 £2.50 5¢ 5'10" 5km 3.5km 4x4 3D 3-D
    F-16 5° ½ 2½ #1 "stop" 'stop' “stop” ‘stop’ «stop» (stop) [stop] {stop} "stop." 'stop.' (stop.)
    and/or black/white A/C t-shirt T-Shirt x-ray half- -half walkie-talkie bird's-eye non-U.S.
    U.S.-based Wal-Mart café naïve Zürich dog... dog.. dog.cat dog,cat dog! dog!! dog?! R&B AT&T :)
    :-) #dog @user www.flickr.com http://flickr.com/abc me@test.com ® ™ ★ 🐶 狗 日本 собака 강아지
    don’t dog’s it’s n't 's boys'team film'the Hawai'i Dunkin' St.Louis D.C.'s DVD's women's C. w/o
"""


def run_java(captions: list[str]) -> list[list[str]]:
    """Return the words of the COCO scorer's own tokeniser."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("no java on the PATH")
    lines = ptb.PTBTokenizer().tokenize({c: [{"caption": c}] for c in captions})
    # Where a caption has ’ the program leaves it; ours are straight.
    return [lines[caption][0].replace("’", "'").split() for caption in captions]


@pytest.mark.parametrize(("caption", "words"), WORDS.items())
def test_captions_are_split_into_the_reference_words(caption, words):
    assert tokenize(caption) == words.split()


def test_java_gives_the_same_words():
    captions = [caption for caption in WORDS if caption.strip()]
    for sentence in ("A man with {} here .", "Boys near {}, running", "two dogs see {} today"):
        captions += [sentence.format(fragment) for fragment in FRAGMENTS.split()]
    for caption, words in zip(captions, run_java(captions), strict=True):
        assert tokenize(caption) == words, caption


def test_tokens_split_again_stay_as_they_are():
    for words in WORDS.values():
        plain = [w for w in words.split() if w.isalnum()]
        assert tokenize(" ".join(plain)) == plain


PLAIN_WORD = (
    st.sampled_from(["a", "A", "B", "dog", "t-shirt", "st", "Mr", "etc", "miss", "Pa", "No", "The"])
    | st.sampled_from(CONTRACTIONS)
    | st.text("aBcdeN", min_size=1, max_size=4)
)


@given(
    st.lists(st.tuples(PLAIN_WORD, st.sampled_from([" ", ", ", " , "])), min_size=1),
    st.sampled_from(["", ".", " .", " ."]),
)
def test_plain_captions_are_split_as_nltk_and_the_tables_split_them(words, end):
    *head, (last, _) = words
    caption = "".join(map("".join, head)) + last + end
    assert tokenize(caption) == list(tokenizer._tokenize(caption))


def test_plain_captions_do_without_nltk():
    code = """
import sys
from util.tokenizer import tokenize
tokenize("A dog runs, and a cat in a t-shirt sleeps .")
print("nltk" in sys.modules)
tokenize("A dog's bowl")
print("nltk" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]


MODEL_TEXT = st.lists(
    st.sampled_from([*WORDS, *FRAGMENTS.split(), *CONTRACTIONS, "no 5", "4 x 4", "t 's", "é"])
    | st.text("abdlmnrstvy0159'", max_size=6)
).map(" ".join)


@given(MODEL_TEXT)
def test_a_models_caption_has_the_tokens_of_its_words(text):
    """Self-critical rewards look up each word's tokens once."""
    words = split_words(text)
    assert tokenize(" ".join(words)) == [token for word in words for token in tokenize(word)]
