"""Words of the built-in stories: lists, and tables whose first line names the slots that a row fills.

A column written `a:noun` fills `{noun}` and, with its article, `{a_noun}`. Columns are separated by `|`.
Names never end in s (possessives stay regular); things are singular, so that "it" always fits.
"""


def words(text: str) -> list[str]:
    """Words separated by white space."""
    return text.split()


def phrases(text: str) -> list[str]:
    """Phrases separated by `|` or by line ends."""
    return text.replace("\n", "|").split("|")


GIRLS = words("""Mia Nora Lily Ella Ruby Hazel Ivy Clara Rosa Lena Tessa Maya Anna Zoe Lucy Daisy Freya
Greta Hanna Ida
Juna Kira Leila Mabel Nina Olive Petra Quinta Rita Sofia Thea Una Vera Wanda Yara Zelda Amina Bella Carmen
Dora
Edith Fatima Gwen Heidi Imani Josie Kavya Luna Marta Nadia Odette Pippa Robin Sarah Tilda Ursa Violet Willa
Xenia
Yuki Ada Beatrix Celia Delia Elsa Flora Ginny Hilda Irma Jade Kezia Linnea Molly Noor Ophelia Poppy Rhea Selma
Talia Una Vivian Winnie Astrid Bridget Cora Dalia Esme Fern Gemma Harriet Isla June Kaia Lotte Mina Nell""")
BOYS = words("""Tom Ben Leo Max Sam Theo Finn Oscar Hugo Jack Noah Eli Omar Ravi Luca Milo Otto Felix Henry
Arlo Bruno
Caleb Dario Emil Farid Gabe Hamid Ivan Jonah Karim Liam Marco Nico Oliver Pablo Quentin Rowan Simon Tariq
Umar Victor
Walter Xavier Yusuf Zeke Adam Boris Cyrus Dylan Ethan Frank George Hector Isaac Jamal Kofi Linus Mateo
Nathan Olaf
Peter Raj Sven Tobin Uri Vikram Wesley Yann Zane Anton Basil Colin Diego Edgar Fergus Gilbert Harvey Igor
Jasper Keith
Lorenzo Malik Ned Orson Percy Ronan Stefan Tyler Ulric Vincent Warren Alden Bert Conrad Desmond Ezra""")
GIRLS, BOYS = (sorted({n for n in names if n[-1] != "s"}) for names in (GIRLS, BOYS))

ELDERS = {"girl": words("Grandma Aunt Mrs. Miss Nana"), "boy": words("Grandpa Uncle Mr. Captain Papa")}
SURNAMES = words("""Pell Marsh Hale Birch Crane Dale Finch Gray Holt Kettle Lark Mott North Oakley Penn
Quill Reed Stone Thorn
Underhill Vale Webb York Archer Bell Carver Drake Elm Fisk Grove Hart Joyce Knox Lane Munro Noble Orr Pike
Rowe Swann
Tully Wick Yardley Abbott Barrow Cobb""")
PET_NAMES = words("""Biscuit Pepper Button Mittens Acorn Bramble Cocoa Dumpling Ember Fig Ginger Hobnob
Inky Jellybean Kipper
Lemon Muffin Nutmeg Oats Pudding Quince Rascal Shadow Toffee Velvet Waffle Yoyo Ziggy Bandit Clover Domino
Eggshell
Fudge Gizmo Honeybun Jinx Ketchup Licorice Marble Noodle Onion Pickle Radish Sprout Truffle Turnip Whiskers
Snowball Smudge Patch Pebble Thimble Bubbles Crumpet Dusty Freckle""")
TOWN_FIRST = words("""Willow Maple Pebble Amber Fox Heron Copper Thistle Juniper Cinder Meadow Otter Raven
Silver Sorrel Tansy
Wren Badger Bluebell Cedar Elder Fern Gull Hollow Iron Laurel Moon Nettle Plum Quarry Rush Salt Swan Tinder
Alder
Barley Cloud Dove Echo Frost""")

COLORS = words("""red blue green yellow purple orange silver golden white black brown pink gray crimson
scarlet turquoise violet
striped spotted speckled ivory emerald copper lavender cream""")
MARKS = phrases("""a star scratched on one side|a tiny dent in the middle
a smooth patch where a thumb could rest
a thin white stripe around it|a crooked heart painted underneath|a chip shaped like a moon
two small letters cut into it|a knot of green thread tied to it|a spot of candle wax on it
a picture of a whale on the front|three dots in a row along the edge|a faint smell of cinnamon
a burnt corner|a strip of leather wrapped around it|a crack that had been glued
a paper label on the back|a shiny bead fixed to the top|a row of little waves drawn on it
a blue ribbon wound about it|the number nine stamped on the bottom""")
TRAITS = words("""curious patient stubborn cheerful careful brave shy clever gentle noisy thoughtful honest
quick dreamy lively
bold merry quiet eager tidy forgetful generous hopeful playful restless sensible friendly proud""")
LIKES = phrases("""riddles|frogs|old maps|counting stars|warm bread|climbing trees|silly songs
ghost stories|collecting buttons
drawing birds|long words|jumping in puddles|magic tricks|wooden puzzles|sour apples|watching clouds|beetles
paper boats
funny hats|making lists|knots|train whistles|sea shells|inventing games|card tricks|feeding sparrows|whistling
cold lemonade|telling jokes|pirate tales|dancing|collecting feathers|playing chess|skipping stones
baking|thunder|tiny insects|astronomy|poems|marching songs""")
NUMBERS = words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen
seventeen eighteen""")

# land | kind of name | eight spots: a preposition, then "the ..."
SETTINGS = """
small farm|Farm|in the barn|behind the hen house|under the hay cart|by the duck pond|beside the stone well|\
near the pigsty|in the apple orchard|next to the scarecrow
fishing village|Bay|by the harbor wall|under the old pier|among the lobster pots|inside the boathouse|\
beside the lighthouse|near the tide pools|behind the net shed|on the pebble beach
village in the woods|Woods|under the great oak|beside the mossy log|by the fern path|\
near the woodcutter's hut|\
behind the bramble bush|at the foot of the pine tree|inside the hollow stump|along the stream
mountain village|Peak|by the wooden bridge|near the waterfall|inside the shepherd's hut|beside the goat pen|\
at the edge of the cliff path|behind the chapel|under the pine trees|by the frozen spring
busy town|Street|by the fountain|under the market clock|behind the bakery|inside the library|\
near the tram stop|\
beside the post office|on the steps of the museum|in the little park
quiet valley|Valley|beside the mill wheel|under the willow tree|near the beehives|by the stepping stones|\
behind the garden wall|in the tall clover|at the top of the hill|inside the tool shed
green island|Island|near the signal tower|under the palm trees|beside the ferry dock|in the sandy cove|\
behind the lifeboat|by the old anchor|inside the smugglers' cave|along the cliff stairs
town by a river|Ford|under the stone bridge|beside the rowing boats|by the river gate|near the water mill|\
behind the ropemaker's yard|on the muddy bank|inside the boat club|at the end of the jetty
windy moor|Moor|beside the standing stone|near the peat stack|behind the sheep wall|under the hawthorn tree|\
by the crooked gate|inside the ruined tower|along the cart track|in the purple heather
market town|Market|under the flower stall|behind the cheese shop|beside the bell tower|near the stable|\
inside the town hall|by the pump|at the corner of the square|in the cobbled alley
railway town|Junction|on the station platform|beside the ticket office|behind the signal box|\
near the water tank|\
under the iron footbridge|inside the waiting room|by the coal heap|at the level crossing
castle on a hill|Castle|inside the kitchen cellar|beside the drawbridge|under the winding stairs|\
by the rose bed|\
behind the armory|near the falcon loft|in the great hall|at the top of the tower
lake village|Lake|by the reeds|beside the canoe rack|under the boardwalk|near the heron rock|\
behind the ice house|\
inside the fishing hut|at the end of the dock|among the water lilies
school in the country|School|behind the bicycle shed|inside the music room|under the climbing frame|\
beside the sandpit|near the vegetable patch|by the coat hooks|at the back of the classroom|\
under the chestnut tree
neighborhood of tall houses|Court|by the mailbox|under the fire escape|behind the laundry lines|\
inside the elevator|near the bicycle rack|beside the flower pots|on the rooftop|at the bottom of the staircase
vineyard in the sun|Hill|between the rows of grapes in the upper field|beside the wine press|\
under the olive tree|\
near the clay jars|behind the tractor|by the lizard wall|inside the cool cellar|at the end of the dusty road
"""

# what each of these people gives
ROLES = """baker|warm loaf
fisher|fat silver fish
weaver|ball of wool
beekeeper|jar of honey
gardener|bunch of carrots
carpenter|smooth wooden spoon
potter|clay cup
tailor|scrap of velvet
shepherd|tin sheep bell
miller|sack of flour
blacksmith|iron hook
painter|pot of blue paint
cobbler|pair of laces
clockmaker|brass key
florist|pot of tulips
cheesemaker|round of cheese
sailor|coil of rope
teacher|stick of chalk
doctor|roll of bandage
grocer|bag of raisins
librarian|book of maps
musician|silver string
candlemaker|tall candle
postman|sheet of stamps
basketmaker|willow basket
farmer|basket of eggs
juggler|leather ball
jeweler|glass bead
bookbinder|empty notebook
innkeeper|pot of soup
hatter|feathered hat
cook|plum tart
toymaker|tin soldier
mason|polished stone
glassblower|green bottle
ferryman|striped flag"""

TABLES = (
    """
a:noun|use|used
kite|fly it|flew it
drum|beat it|beat it
whistle|blow it|blew it
ball|bounce it|bounced it
spinning top|spin it|spun it
rag doll|carry it about|carried it about
toy boat|sail it|sailed it
lantern|light it|lit it
compass|read it|read it
locket|wear it|wore it
flute|play it|played it
yo-yo|swing it|swung it
umbrella|twirl it|twirled it
telescope|look through it|looked through it
music box|wind it up|wound it up
puppet|make it dance|made it dance
scarf|wrap it around everything|wrapped it around everything
harmonica|play it|played it
paper fan|wave it|waved it
toy train|push it along|pushed it along
notebook|write in it|wrote in it
paintbrush|paint with it|painted with it
bell|ring it|rang it
magnet|test it on spoons|tested it on spoons
hoop|roll it|rolled it
wooden sword|wave it|waved it
tin cup|drink from it|drank from it
trumpet|blow it|blew it
blanket|hide under it|hid under it
pocketknife|carve with it|carved with it
cap|toss it up|tossed it up
magnifying glass|peer through it|peered through it
marble|roll it|rolled it
key ring|jingle it|jingled it
toy horse|gallop it about|galloped it about
fishing rod|cast it|cast it
wagon|pull it|pulled it
pinwheel|make it turn|made it turn
teapot|pour from it|poured from it
jump rope|skip with it|skipped with it
backpack|wear it|wore it
feather pen|write with it|wrote with it
picture book|read it|read it
banjo|strum it|strummed it
boomerang|throw it|threw it
teddy bear|hug it|hugged it
hand mirror|flash it in the sun|flashed it in the sun
wooden duck|float it|floated it
sketchbook|draw in it|drew in it
pencil box|rattle it|rattled it""",
    """
a:season|weather|wear
spring|a soft rain had just stopped|rubber boots
spring|the first buds were open|thin jacket
spring|puddles shone on every path|rubber boots
spring|swallows darted over the roofs|knitted vest
spring|a warm breeze smelled of blossom|straw hat
summer|the sun was high and hot|straw hat
summer|bees hummed in the flowers|sandals
summer|not one cloud was in the sky|sun hat
summer|the air was still and dusty|cotton shirt
summer|crickets sang in the dry grass|sandals
autumn|the wind chased leaves along the ground|wool sweater
autumn|a gray mist hung low|thick coat
autumn|chestnuts kept dropping with a thump|corduroy jacket
autumn|geese were flying south|wool scarf
autumn|the air smelled of smoke and apples|patched coat
winter|snow lay thick on every roof|fur mittens
winter|frost sparkled on the windows|wool scarf
winter|icicles hung from the gutters|padded coat
winter|a few snowflakes drifted down|knitted cap
winter|the cold wind nipped at every nose|thick gloves""",
    """
a:pet|sound|moved|treat|petlook
dog|barked|bounded|a beef bone|shaggy
puppy|yapped|tumbled|a crunchy biscuit|floppy
cat|meowed|slipped|a saucer of cream|sleek
kitten|mewed|scampered|a bit of tuna|fluffy
pony|whinnied|trotted|a sugar lump|stocky
goat|bleated|skipped|a cabbage leaf|bearded
donkey|brayed|plodded|a carrot|long-eared
duck|quacked|waddled|a crust of bread|plump
goose|honked|marched|a handful of corn|bossy
hen|clucked|scurried|some sunflower seeds|feathery
parrot|squawked|fluttered|a ripe banana|bright
crow|cawed|flapped|a shelled peanut|glossy
ferret|chirped|wriggled|a spoonful of egg|slinky
pig|grunted|trundled|an apple core|spotted
monkey|chattered|swung along|a sweet date|nimble
lamb|bleated|frisked|a bottle of milk|woolly
squirrel|chattered|leapt|a hazelnut|bushy-tailed
raven|croaked|hopped|a piece of bacon|dark-eyed""",
    """
a:wild|home|wildfood
hedgehog|its nest of leaves|a saucer of cat food
fox cub|its den|a scrap of chicken
owlet|its hollow tree|a strip of meat
duckling|its mother on the water|some soft oats
fawn|its herd|a bunch of clover
baby rabbit|its burrow|a dandelion
young badger|its sett|a few peanuts
sparrow|its flock in the hedge|some crumbs
tortoise|its garden|a slice of cucumber
otter pup|its riverbank|a small trout
squirrel|its drey|two walnuts
baby goat|its mother|a willow twig
calf|its field|a bucket of milk
piglet|its warm pen|some mashed turnip
bat|its roost|a drop of water
lizard|its sunny wall|a fat beetle
mole|its tunnel|a juicy worm
swan|its nest in the reeds|some lettuce""",
    """
stuck|bad|badwhy|good|how
caught in a wire fence|a stick|the stick snapped in two|a pair of pliers|bent the wire apart
at the bottom of a dry ditch|a rope|there was no one to tie it|a long plank|made a ramp out of it
high on a narrow ledge|a chair|the chair was far too short|a tall ladder|climbed up slowly
tangled in an old net|bare hands|the knots were too tight|a pair of scissors|cut the cords one by one
trapped under a fallen branch|a shout for help|nobody was near|a strong pole|levered the branch up
stuck in thick mud|a piece of bread|food was no help at all|two wide boards|lay flat and reached out
shut inside an empty shed|a hairpin|the lock would not turn|a borrowed key|opened the door wide
floating away on a loose board|a thrown stone|it only made waves|a garden rake|hooked the board and pulled
wedged behind a heavy barrel|a broom|the broom bent like grass|a rolling log|tipped the barrel to one side
caught in the brambles|a gentle tug|the thorns held fast|a pair of thick gloves|parted the thorns stem by stem
down a deep hole|a long stick|there was nothing to hold on to|a basket on a rope|lowered it and waited
frozen with fear on a thin branch|a whistle|it only trembled more|a spread blanket|held it tight below""",
    """
a:build|parts|a:tool|extra|purpose
birdhouse|nails|hammer|a square of old roof tin|so that the wrens would have a home
raft|barrels|saw|a sail made from a sheet|so that they could float across the water
treehouse|planks|hammer|a rope ladder|so that they would have a place of their own
wind vane|screws|screwdriver|a rooster cut from a can|to tell which way the wind blew
go-cart|bolts|wrench|a steering rope|to roll down the long slope
puppet theater|boards|saw|a curtain of yellow cloth|to put on a show
scarecrow|poles|knife|a coat with no buttons|to keep the crows off the peas
rabbit hutch|planks|hammer|a latch made of bent wire|so that the rabbits could sleep dry
little bridge|logs|ax|a handrail of twisted rope|so that nobody would get wet feet
water wheel|paddles|drill|an axle from a broken bicycle|to turn the toy mill
bench|screws|drill|a cushion stuffed with straw|so that old people could rest
snow sled|slats|saw|a pair of waxed runners|to race along the lane
weather station|hooks|pliers|a jar to catch the rain|to guess what tomorrow would bring
stone oven|bricks|trowel|a door made from a pan lid|to bake bread outdoors""",
    """
a:dish|main|second|third|utensil
plum cake|plums|flour|honey|wooden spoon
vegetable soup|carrots|barley|thyme|ladle
apple pie|apples|butter|cinnamon|rolling pin
pumpkin stew|onions|pumpkin|pepper|iron pot
batch of pancakes|eggs|milk|maple syrup|frying pan
lemon tart|lemons|sugar|cream|whisk
potato salad|potatoes|mustard|dill|big bowl
berry pudding|handfuls of berries|oatmeal|vanilla|baking dish
fish chowder|clams|corn|parsley|soup kettle
pot of jam|baskets of cherries|sugar|ginger|copper pan
walnut bread|walnuts|yeast|molasses|bread tin
pot of dumplings|dumplings|cabbage|soy sauce|steamer
pear crumble|pears|oats|nutmeg|oven tray
tomato sauce|tomatoes|garlic|basil|paddle""",
    """
a:contest|contesting|mishap|prize
sack race|hopping|caught one foot in the sack|a ribbon
kite race|flying|got the string tangled|a medal
pie contest|baking|dropped the best spoon|a silver plate
singing contest|singing|forgot the second verse|a music stand
boat race|rowing|lost hold of one oar|a pennant
spelling contest|spelling|mixed up two letters|a dictionary
sled race|sledding|slid into a drift|a woolen hat
pumpkin contest|growing pumpkins|slipped on a wet leaf|a wheelbarrow
drawing contest|drawing|spilled the ink|a box of crayons
egg-and-spoon race|balancing|nearly dropped the egg|a chocolate egg
sandcastle contest|digging|knocked down one tower|a bucket and spade
stilt race|walking on stilts|wobbled into a hedge|a trophy
juggling contest|juggling|let two balls roll away|a bag of toffees
wheelbarrow race|pushing|hit a stone with the wheel|a basket of peaches""",
    """
skill|skilling|skilled|trouble|tip
whistle a tune|whistling|whistled|only air came out|wet your lips and blow gently
ride a bicycle|riding|rode|the wheels wobbled badly|look ahead and not at your feet
knit a scarf|knitting|knitted|the stitches fell off the needle|count every row out loud
juggle three apples|juggling|juggled|the apples rolled everywhere|throw high and keep calm
tie a sailor's knot|tying knots|tied|the rope kept slipping|go slowly and pull last
walk on stilts|walking on stilts|walked|both stilts slid apart|take small steps
play the fiddle|fiddling|fiddled|the strings only screeched|hold the bow as if it were an egg
skip a stone|skipping stones|skipped|every stone sank|choose a flat one and throw low
bake a loaf|baking|baked|the dough would not rise|keep it warm and wait
read the stars|stargazing|gazed|all the stars looked the same|find the brightest one first
paddle a canoe|paddling|paddled|the canoe turned in circles|change sides after every stroke
milk a goat|milking|milked|not one drop came|be gentle and hum to it
stand on your hands|practicing|balanced|everything tipped over|press your fingers into the ground
carve a spoon|carving|carved|the wood split|always follow the grain
dance a jig|dancing|danced|left and right got mixed up|listen to the drum and not the fiddle""",
    """
noise|cause|fix
a slow tap, tap, tap|a loose shutter swinging in the wind|tied the shutter down
a long, low moan|the wind blowing over an empty jug|turned the jug on its side
a scratch and a squeak|a family of mice in the flour bin|moved the bin up to a shelf
a soft flap, flap|a forgotten shirt on the line|took the shirt down and folded it
a clink like tiny bells|a magpie playing with spoons|put the spoons in a drawer
a drip and then a plop|rain falling through a hole in the roof|set a pail under the hole
a grumble like a giant|a hedgehog snoring in a box|covered the box with straw
a thump and a rattle|a cart wheel knocking against the wall|wedged the wheel with a brick
a whisper in the dark|dry leaves sliding under the door|swept the leaves away
a hoot and a click|a barn owl with two chicks|left the owls in peace
a creak like old bones|a gate that needed oil|rubbed some oil on the hinge
a buzz that came and went|a bumblebee inside a jar|let the bee out of the window""",
    """
seed|crop|pest|guard
sunflower seeds|tall sunflowers|snails|a ring of crushed shells
bean seeds|climbing beans|beetles|a spray of soapy water
pumpkin seeds|fat pumpkins|slugs|a saucer of salt water
pea seeds|sweet peas|pigeons|a net on four sticks
radish seeds|crisp radishes|rabbits|a fence of woven twigs
melon seeds|round melons|ants|a stripe of chalk
corn seeds|rows of corn|crows|strips of shiny foil
squash seeds|yellow squashes|caterpillars|a cage of fine mesh
tulip bulbs|scarlet tulips|mice|a circle of holly leaves
cucumber seeds|cool cucumbers|earwigs|a pot stuffed with straw
lettuce seeds|curly lettuces|ducks|a low wall of bricks
cherry pits|tiny cherry trees|deer|a string of tin cans""",
    """
a:storm|stormsign|damage
thunderstorm|black clouds piled up like mountains|tore a branch from the tallest tree
blizzard|the sky turned as white as milk|buried the path up to the knee
gale|the gulls all flew inland|blew three tiles off the roof
hailstorm|the air went strangely still|cracked two panes of glass
flood|the water rose a little every hour|carried off the garden gate
dust storm|a brown wall stood on the horizon|covered every plate with grit
ice storm|the rain began to freeze as it fell|bent the bushes to the ground
cloudburst|swallows flew low over the grass|turned the lane into a brook""",
    """
wares|sold|wanted
jars of jam|jars|a new saucepan
woolen socks|pairs|a spinning wheel
paper flowers|bunches|a box of watercolors
honey cakes|cakes|a beehive
carved whistles|whistles|a better knife
clay bowls|bowls|a bag of fine glaze
beeswax candles|candles|a lantern for the porch
bags of walnuts|bags|a pair of warm boots
lavender pillows|pillows|a sewing box
bottles of cider|bottles|a wheel for the cart
straw baskets|baskets|a ticket to the circus
painted eggs|eggs|three speckled hens""",
    """
goody|trail
buns|crumbs
fish pies|fish bones
jam tarts|sticky red spots
cheese rolls|bits of rind
meat pasties|flakes of crust
nut cookies|broken nuts
honey cakes|golden drops
cream puffs|white smears""",
    """
game|rule
hide-and-seek|count to fifty
leapfrog|bend low and keep still
hopscotch|never step on a line
blindman's buff|turn around three times
tag|run as fast as the wind
marbles|kneel down and aim
charades|say nothing at all
tug-of-war|dig in both heels
statues|freeze when the music stops
kick the can|guard the can""",
)
