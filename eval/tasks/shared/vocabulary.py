"""Names, numbers and topics for the tasks, all of the evaluation's key space.

None of them is ever trained on by `longctx.train.data.synthetic`: both draw what `split_of` says is
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import lru_cache
from random import Random
from typing import Literal

from longctx.prompts.passkey_prompts import split_of

__all__ = ["draw", "listed", "names", "number", "topics", "variable", "words"]

_WORDS = {
    "adjective": (
        "able absent agile airy alert ample amused ancient ardent austere avid awake bald basic "
        "bitter bland blunt bold bouncy brave breezy brief bright brisk broad bulky calm candid "
        "careful casual chilly civil classic clean clear clever cloudy clumsy coarse cold comic "
        "common compact content cool cosy crisp crooked cryptic curious curly dainty damp "
        "daring dazzling decent deep dense distant dizzy double dreamy dry dull dusty eager "
        "early earnest easy elastic elegant empty endless equal exact exotic faded faint fair "
        "famous fancy fast feeble festive fierce firm flaky flat fluffy fluid fond formal "
        "fragile fresh frosty frugal gaudy gentle giant giddy glad gleaming glossy golden "
        "graceful grand grassy grave greedy grumpy handy happy hardy harsh hasty hazy heavy "
        "hollow honest huge humble humid icy idle inner jagged jolly jumpy keen kind large "
        "lavish lazy lean level light limp lively lofty lonely loose loud loyal lucid lucky "
        "lunar mature mellow mild minor misty modern modest muddy narrow neat nimble noble "
        "noisy novel oblong odd old open ornate oval pale patient placid plain plucky polite "
        "prickly prime proud quaint quick quiet rapid rare ready remote rich rigid robust rough "
        "round royal rugged rusty salty sandy secret serene shady sharp shiny short shy silent "
        "silky simple sleepy slim slow smooth snowy sober soft solar solid sour sparse spicy "
        "spry square stable steep stern sticky stiff stormy strict strong sturdy subtle sunny "
        "supple sweet swift tall tame tart tender tepid thick thin thorny tidy tiny torpid "
        "tough tranquil tricky tropical upbeat vague vast velvet violet vivid warm wary wavy "
        "weary wide wild windy wise witty wooden woolly young zesty"
    ),
    "noun": (
        "acorn acre actor airport alcove almond alphabet amber anchor angle ankle antler apple "
        "apricot apron arch arena armchair arrow atlas attic autumn awning axle badge bagel "
        "bakery balcony ballad balloon banjo banner barn barrel basin basket bather beacon "
        "beard beaver bell bench berry bicycle birch biscuit blanket blossom board boat bonfire "
        "book border bottle boulder bowl bracelet branch bread breeze brick bridge brook broom "
        "brush bucket buckle bugle bureau butter button cabbage cabin cable cactus camel camera "
        "canal candle canoe canvas canyon cape caramel card cargo carpet carrot cart castle "
        "cattle cavern cedar celery cellar chair chalk channel chapel cherry chestnut chimney "
        "chisel choir cider cinema circle citrus clarinet cliff cloak clock cloud clover coast "
        "cobbler coconut coin collar comet compass copper coral cork corner cottage cotton "
        "couch county cradle crane crater crayon creek cricket crown crystal cup curtain "
        "cushion custard dahlia daisy dam dancer desert desk diamond diary dingo dock dolphin "
        "donkey door dough dove dragon drawer drum dune eagle easel echo elbow elk elm ember "
        "engine envelope essay fable fabric falcon farm feather fence fern ferry fiddle field "
        "fig finch flagpole flame flannel flask fleet flint floor flour flute foam forest fork "
        "fossil fountain fox frame frog galaxy garden garlic gate geyser giraffe glacier globe "
        "glove goat gondola goose granite grape gravel grove guitar gull hammer hamper handle "
        "harbor harp hat hatch hawk hazel hedge helmet hermit heron hill hinge holly honey hoof "
        "horizon horn hotel igloo inlet insect iris iron island ivory ivy jacket jar jasmine "
        "jewel jigsaw jungle juniper kayak kettle key kid kitchen kite kitten knot ladder "
        "lagoon lake lamp lantern larch lark lawn leaf lemon lens lentil letter library lily "
        "lime linen lion lizard lobster locket loom lotus lumber lute lynx magnet magpie mango "
        "mantle map maple marble market marsh mask mast meadow medal melon mill mint mirror "
        "mitten moat mole moon moss moth motor mug muffin mural museum napkin nest net notebook "
        "nutmeg oak oar oasis oat ocean olive onion opera orbit orchard organ otter oven owl "
        "oyster paddle palace palm panda pantry paper parade parcel parrot parsley pasture path "
        "pavilion peach pear pebble pelican pencil pepper petal piano pickle pier pigeon pillar "
        "pillow pine pipe pirate planet plank plaza plum pocket pond poplar poppy porch "
        "portrait postcard potato pottery prairie prism pulley pumpkin puppet purse puzzle "
        "pyramid quarry quill quilt rabbit raccoon radio raft railway raisin rake ranch raven "
        "reed reef ribbon rice river robin rocket roof rope rose rudder ruler saddle sail salad "
        "salmon sandal saucer scarf school"
    ),
    "subject": (
        "almanacs,amateur theatre,apple orchards,archery,attic rooms,ballet,barometers,"
        "barn dances,basket making,bell towers,bird watching,board games,bonsai trees,"
        "bookbinding,brass bands,bread ovens,bridges,butterfly houses,cable cars,calligraphy,"
        "camels,candle making,card games,caves,cheese making,choirs,circuses,city maps,"
        "comic books,compasses,cycling,deserts,dry stone walls,encyclopedias,ferry boats,"
        "film music,fire brigades,flower markets,fog horns,fossils,gardening tools,geysers,"
        "globes,harvest festivals,hedge mazes,herb gardens,hot air balloons,ice skating,"
        "island lighthouses,jigsaw puzzles,juggling,kite flying,knitting,lace making,"
        "lake steamers,language courses,leather work,marathons,mirrors,mosaics,mountain huts,"
        "mushrooms,museums,musical boxes,newspapers,oases,organ pipes,origami,parks,pearl diving,"
        "pendulum clocks,perfume,picnics,pocket watches,post offices,pottery,radio plays,"
        "railway stations,rope bridges,rowing,rugs,sailing ships,sculpture gardens,"
        "second-hand books,shadow puppets,snow sculptures,spice trade,stained glass,star charts,"
        "stone circles,sundials,swimming pools,tapestries,toy trains,treasure maps,umbrellas,"
        "violin making,water wheels,whistles,wood carving"
    ),
    "aspect": (
        "appeal,art,benefits,biology,challenges,chemistry,colours,culture,customs,design,"
        "development,discovery,early years,effects,engineering,ethics,finances,future,geography,"
        "golden age,growth,history,humour,importance,influence,invention,language,legends,limits,"
        "local traditions,meaning,methods,myths,organisation,origins,physics,popularity,"
        "practical uses,psychology,restoration,revival,rules,science,spread,symbolism,technology,"
        "typical mistakes,vocabulary"
    ),
}


def words(kind: Literal["adjective", "noun"]) -> tuple[str, ...]:
    """All words of a kind, of both key spaces."""
    return tuple(_WORDS[kind].split())


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """All names of an adjective and a noun, such as "torpid-kid"."""
    every = (
        f"{adjective}-{noun}"
        for adjective in _WORDS["adjective"].split()
        for noun in _WORDS["noun"].split()
    )
    return tuple(name for name in every if split_of(name) == "eval")


@lru_cache(maxsize=1)
def topics() -> tuple[tuple[str, str], ...]:
    """All topics, as aspect and subject: the topic is "the {aspect} of {subject}"."""
    return tuple(
        (aspect, subject)
        for subject in _WORDS["subject"].split(",")
        for aspect in _WORDS["aspect"].split(",")
        if split_of(f"the {aspect} of {subject}") == "eval"
    )


def draw(make: Callable[[], str], taken: Container[str] = ()) -> str:
    """Draw until there is something of the evaluation's key space that is not taken."""
    while split_of(word := make()) != "eval" or word in taken:
        pass
    return word


def number(rng: Random, digits: int, taken: Container[str] = ()) -> str:
    """A number of so many digits."""
    return draw(lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)), taken)


def variable(rng: Random, taken: Container[str] = (), letters: int = 5) -> str:
    """A name of so many capital letters."""
    return draw(lambda: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters)), taken)


def listed(items: Sequence[str]) -> str:
    """A list as a sentence has it, which is what models say unasked: "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"
