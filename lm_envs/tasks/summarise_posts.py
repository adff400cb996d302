"""Posts that people might write about everyday troubles, with the facts of each and a summary, made by a small grammar.

A scenario is a text with two slots, filled with five and two words; a sentence that is beside the point stands in the
middle, so that a good summary leaves something out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """A kind of post, with ``{a}`` and ``{b}`` for the words of its slots.

    Attributes:
        a, b: the words of the slots, separated by commas: five and two.
        title, before, after: of the post; what is beside the point goes between the last two.
        summary: one sentence.
        facts: what a summary should mention, separated by commas; words that say the same are separated by bars.
    """

    a: str
    b: str
    title: str
    before: str
    after: str
    summary: str
    facts: str


_ASIDES = (
    "It has been raining here all week, by the way.",
    "I am writing this on my phone, so excuse the typing.",
    "We had pancakes that morning, which is the only good part of this story.",
    "My phone battery was almost empty as usual.",
    "I have not told anybody else about this yet.",
    "It was a Tuesday, and I was late for everything.",
    "I do like living in this town otherwise.",
    "Sorry if this gets long, I have had a lot of coffee.",
    "The radio was playing the same song all day.",
    "My cat was asleep on the keyboard while I wrote the first version of this.",
    "I have read some older posts here and found nothing that fits.",
)
SCENARIOS = (
    Scenario(
        "brother, sister, cousin, roommate, neighbor",
        "laptop, bicycle",
        "Lent something, never got it back",
        "Two months ago my {a} asked to borrow my {b} for a weekend. I said yes, because it sat around unused anyway.",
        "When I asked for it last week, I was told that it had been sold to pay a phone bill. My {a} offers to pay me "
        "back in small parts over a year and does not see why I am upset.",
        "My {a} borrowed my {b}, sold it to pay a bill, and wants to pay me back over a year.",
        "{a}, {b}, sold|sell, pay|repay|money",
    ),
    Scenario(
        "office, school, gym, library, clinic",
        "bus, train",
        "Moving closer or keeping the flat",
        "I have lived in the same cheap flat for six years. It is quiet, and I know everybody in the house.",
        "The {a} where I work has moved to the other end of the city, and the {b} now takes me ninety minutes each "
        "way. A flat nearby would cost three hundred dollars more every month. I cannot decide what to do.",
        "The {a} where I work moved, the {b} takes ninety minutes, and I wonder whether to pay more for a flat nearby.",
        "{a}, {b}, ninety|90|long|commute, flat|apartment|move|rent",
    ),
    Scenario(
        "wedding, birthday, graduation, reunion, anniversary",
        "Portugal, Scotland",
        "Invited far away and short of money",
        "A good friend of mine from school is having a {a} party in May. We have known each other since we were six.",
        "The party is in {b}, and the flight alone would cost as much as a month of rent. I have already promised to "
        "come. How do I tell my friend that I cannot afford it?",
        "I promised to come to a friend's {a} in {b}, but I cannot afford the flight and do not know how to say so.",
        "friend, {a}, {b}, afford|cost|expensive|money",
    ),
    Scenario(
        "drums, trumpet, piano, violin, bagpipes",
        "midnight, dawn",
        "The neighbor upstairs makes music",
        "Our house has thin walls and eight flats. Until spring it was the most peaceful place I ever lived in.",
        "Since then the man upstairs has practiced the {a} around {b} almost every day. I have knocked on his door "
        "twice, and he only laughed. The landlord does not answer my letters.",
        "The man upstairs practices the {a} around {b}, laughs at my complaints, and the landlord does not answer.",
        "{a}, {b}, upstairs|neighbor|man, landlord",
    ),
    Scenario(
        "dog, cat, parrot, rabbit, hamster",
        "garden, attic",
        "Our pet is gone",
        "We have had our {a} for three years, and the children love it more than anything.",
        "On Saturday a workman left a door open, and it ran off. We searched the whole street until dark. On Monday "
        "it turned up in the {b} of an old lady who had fed it and now wants to keep it.",
        "Our {a} ran off and was found in the {b} of an old lady, who now wants to keep it.",
        "{a}, {b}, ran|run|escaped|lost|door, lady|woman, keep|kept",
    ),
    Scenario(
        "Spanish, Japanese, Greek, Polish, Arabic",
        "grandmother, girlfriend",
        "Learning a language in secret",
        "For a year I have taken lessons every evening without telling anybody in my family.",
        "I wanted to surprise my {b}, who grew up speaking {a}. Yesterday we sat at dinner, and I understood that she "
        "was telling her sister how boring I am. Now I do not know whether I should speak up.",
        "I learned {a} in secret to surprise my {b} and then understood her calling me boring.",
        "{a}, {b}, secret|surprise|secretly, boring|bored",
    ),
    Scenario(
        "kitchen, bathroom, roof, cellar, balcony",
        "plumber, builder",
        "Work that never ends",
        "When we bought our house, we knew that some rooms needed work and had put money aside for it.",
        "In March a {b} tore up the {a}, took half of the money in advance, and has come only three days since. He "
        "says that he is waiting for parts. We want to hire somebody else but fear to lose what we paid.",
        "A {b} tore up our {a}, took half of the money, and hardly comes, and we fear to lose it by hiring another.",
        "{a}, {b}, half|money|paid|pay|advance, hire|another|else",
    ),
    Scenario(
        "manager, teacher, coach, director, editor",
        "plan, report",
        "Somebody else got the praise",
        "I have been in the same team for four years, and mostly it is a pleasant place to be.",
        "Last month I spent my evenings on a {b} that would save us a lot of time. My {a} presented it on Monday under "
        "another name and was praised in front of everyone. I am afraid of trouble if I complain.",
        "My {a} presented my {b} under another name and was praised, and I am afraid to complain.",
        "{a}, {b}, praised|praise|credit, complain|afraid|trouble",
    ),
    Scenario(
        "guitar, camera, watch, painting, lamp",
        "flea market, yard sale",
        "Bought for nothing, worth a fortune",
        "I love old things and go out looking for them on most Sundays, usually with my father.",
        "Last Sunday I paid five dollars for a {a} at a {b}. An expert has now told me that it is worth four thousand. "
        "My father says that I should find the seller, who looked poor, and share the money.",
        "I bought a {a} for five dollars at a {b}, it is worth four thousand, and my father wants me to share.",
        "{a}, {b}, thousand|worth|fortune, father|share|seller",
    ),
    Scenario(
        "rice, beans, soup, noodles, potatoes",
        "student, musician",
        "Eating the same thing every day",
        "I moved out of my parents' house in autumn and am on my own for the first time.",
        "As a {b} I have forty dollars a week for everything, so I have eaten {a} twice a day for two months. I am "
        "tired all the time and have no oven, only a small stove. What else is cheap and healthy?",
        "I am a {b} with little money who eats {a} every day, feels tired, and asks for cheap and healthy meals.",
        "{b}, {a}, tired, cheap|money|healthy|dollars",
    ),
    Scenario(
        "marathon, triathlon, regatta, rally, tournament",
        "knee, shoulder",
        "Start anyway or give up the place",
        "I have trained for this since last summer, through the snow and before work.",
        "The {a} is in nine days, and since Thursday my {b} hurts at every move. The doctor says to rest for a "
        "month. My friends have booked rooms to come and watch, and the fee is not paid back.",
        "My {b} hurts nine days before the {a}, the doctor says to rest, and my friends have booked rooms to watch.",
        "{a}, {b}, doctor|rest, friends|friend|booked|fee",
    ),
    Scenario(
        "tomatoes, pumpkins, roses, strawberries, lettuce",
        "snails, pigeons",
        "Something eats my garden",
        "This is the first year that I have had a garden, a small one behind the house.",
        "I planted {a} in April and watered them daily. Now {b} eat them faster than they grow. I do not want to use "
        "poison, because the neighbor's children play there. The fence that I built did not help.",
        "In my first garden {b} eat the {a}, a fence did not help, and I do not want to use poison.",
        "{a}, {b}, poison, fence",
    ),
    Scenario(
        "uncle, aunt, grandfather, stepmother, godmother",
        "Christmas, Easter",
        "Presents that come with advice",
        "Our family is large, and every holiday has its own customs and its own quarrels.",
        "Every {b} my {a} gives me a book about losing weight and talks about it at the table. This year I want to "
        "stay at home, but my mother would be sad and begs me to come and keep the peace.",
        "Every {b} my {a} gives me a book about losing weight, so I want to stay at home, but my mother begs me to "
        "come.",
        "{a}, {b}, weight|book, home|stay, mother",
    ),
    Scenario(
        "novel, song, film, play, game",
        "producer, publisher",
        "An offer that looks too good",
        "I have worked at a bank for ten years and only ever wrote for my own pleasure.",
        "A friend sent my first {a} to a {b} without asking me. They like it and offer money, but I would have to quit "
        "the bank and finish a second one within a year. My husband is proud and my parents are horrified.",
        "A {b} offers money for my first {a}, but I would have to quit the bank and finish another within a year.",
        "{a}, {b}, quit|leave|job|bank, year|second|another",
    ),
    Scenario(
        "wallet, ring, passport, necklace, suitcase",
        "taxi, train",
        "Lost on the way home",
        "My wife and I were coming back from the first holiday that we have had in five years.",
        "At the door I noticed that I had left the {a} in the {b}. The company says that nothing was found. Then a "
        "stranger called and wants two hundred dollars to return it. Should I pay or go to the police?",
        "I left my {a} in a {b}, and a stranger wants two hundred dollars to return it.",
        "{a}, {b}, stranger|somebody|someone, hundred|dollars|pay|money, police|return",
    ),
    Scenario(
        "math, history, chemistry, music, geography",
        "grade, exam",
        "My son and his teacher",
        "My son is twelve and has always liked school. Lately he comes home in tears.",
        "His {a} teacher makes jokes about his stutter before the class, and he stopped speaking up. His last {b} was "
        "the worst that he ever had. The principal says that the man retires in summer and that we should wait.",
        "The {a} teacher jokes about my son's stutter, his last {b} was bad, and the principal tells us to wait.",
        "{a}, {b}, stutter|jokes|joke, son, principal|wait",
    ),
    Scenario(
        "car, van, truck, motorcycle, tractor",
        "brakes, lights",
        "Sold as new and broken in a week",
        "I had saved for two years and finally had enough to buy something that I really need for work.",
        "The {a} looked fine, and the dealer swore that it had been checked. After six days the {b} failed on a hill. "
        "A mechanic found old damage that had been painted over. The dealer will not take it back.",
        "The {b} of the {a} that I bought failed after six days, and the dealer will not take it back.",
        "{a}, {b}, failed|fail|broke|damage, dealer|seller",
    ),
    Scenario(
        "coffee, sugar, chocolate, cigarettes, soda",
        "week, month",
        "Giving it up is harder than I thought",
        "My doctor was quite clear this time, and my sister made a bet with me that I would not last.",
        "I have now been without {a} for a {b}. I sleep badly, have headaches, and shout at people who did nothing. "
        "Everybody says that it gets better. When does it, and what helped you?",
        "I have been without {a} for a {b}, have headaches and sleep badly, and ask when it gets better.",
        "{a}, {b}, sleep|headaches|headache|shout, better|helped|help",
    ),
    Scenario(
        "choir, band, theater group, book club, chess club",
        "treasurer, founder",
        "Leaving without a fight",
        "I joined eight years ago when I was new in town, and I found most of my friends there.",
        "The {b} of our {a} decides everything alone now and has thrown out two members who asked questions. I would "
        "like to leave, but they need me for the show in June, and I do not want to hurt the others.",
        "The {b} of our {a} throws out people who ask questions, and I want to leave without hurting the others before "
        "the show.",
        "{a}, {b}, leave|quit, show|others|june|members",
    ),
    Scenario(
        "bakery, bookshop, cinema, pharmacy, hardware store",
        "rent, loan",
        "Keep the family business or close it",
        "My parents opened the shop before I was born, and I have run it since they grew old.",
        "Now the {b} has doubled, and most people order online. If the {a} closes, three workers lose their jobs. A "
        "chain offers to buy us but would keep only one of them. My parents leave it all to me.",
        "The {b} for our {a} has doubled, and I must choose between closing and a chain that keeps one of three "
        "workers.",
        "{a}, {b}, chain|buy|sell, workers|worker|jobs|job",
    ),
    Scenario(
        "nurse, pilot, lawyer, chef, farmer",
        "daughter, nephew",
        "A career that nobody wanted",
        "In our family everybody has been an engineer for three generations, and we are rather proud of it.",
        "At dinner my {b} told us of a plan to become a {a}, and has already left the university. My husband will not "
        "talk about it. I only want them both at one table again.",
        "My {b} left the university to become a {a}, and my husband will not talk about it.",
        "{a}, {b}, university|college|left|engineer, husband|talk",
    ),
    Scenario(
        "tent, stove, map, boots, rope",
        "mountain, desert",
        "A trip that nearly went wrong",
        "Three of us have gone hiking together every year since college, and nothing ever happened.",
        "This time Ben had forgotten the {a} and told nobody until we were in the {b}. We spent a cold night in the "
        "open, and one of us got ill. Ben says that it was an adventure. I do not want to travel with him again.",
        "Ben forgot the {a}, we spent a cold night in the {b}, and I do not want to travel with him again.",
        "Ben, {a}, {b}, night|cold|ill, again|travel",
    ),
    Scenario(
        "sofa, piano, wardrobe, fridge, bathtub",
        "stairs, landing",
        "Stuck between two floors",
        "On Saturday I moved in with my boyfriend, with the help of four friends and a rented van.",
        "The {a} got stuck on the {b} and has been there since. Nobody in the house can pass, and the neighbors are "
        "furious. A company wants six hundred dollars to get it out, more than it cost.",
        "My {a} is stuck on the {b}, the neighbors are furious, and getting it out costs more than it did.",
        "{a}, {b}, stuck, neighbors|neighbor, dollars|cost|costs|company",
    ),
    Scenario(
        "beard, tattoo, wig, hat, mustache",
        "bank, hotel",
        "Rules about how I look",
        "I have worked at the front desk for seven years and never had a complaint.",
        "Since the {b} was sold, there is a list of what we may wear, and my {a} is against the rules. I have a scar "
        "below it that I do not want to show. They gave me until Friday. Can they really ask for this?",
        "The new owners of the {b} forbid my {a}, which hides a scar, and I have until Friday.",
        "{a}, {b}, scar, rules|rule|forbid|friday",
    ),
)
_SPLITS = ("train", "test")
_VALIDATION = (4, 17)  # scenarios


def rows() -> list[dict[str, Any]]:
    """Return ten posts of each scenario: ``title``, ``post``, ``summary``, ``facts`` (lists of words that say the same)
    and ``split``. A scenario is in one split."""
    made = []
    for number, scenario in enumerate(SCENARIOS):
        split = "validation" if number in _VALIDATION else _SPLITS[number % 2]
        for each, (a, b) in enumerate(itertools.product(scenario.a.split(", "), scenario.b.split(", "))):
            aside = _ASIDES[(7 * number + each) % len(_ASIDES)]

            def filled(text: str, a: str = a, b: str = b) -> str:
                return text.format(a=a, b=b)

            made.append(
                {
                    "title": filled(scenario.title),
                    "post": " ".join([filled(scenario.before), aside, filled(scenario.after)]),
                    "summary": filled(scenario.summary),
                    "facts": [fact.split("|") for fact in filled(scenario.facts).split(", ")],
                    "split": split,
                }
            )
    return made
