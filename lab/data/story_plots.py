"""Sentences of the built-in stories: shared rules and plots, in the template language of lab/data/stories.py.

`[a|b]` chooses at random, `[?a|b]` the same for a detail that a brief telling omits, `[~a|b|c]` by the
        story's voice (so one story keeps
one style), `<rule>` includes a shared rule, `{slot}` is filled from the story's cast, `/` starts a
        paragraph; line ends count as spaces.
Slots: {H} hero, {F} friend, {R} and {Q} more children, {E} elder, with pronouns he him his / fhe ... / rhe
        ... /
qhe ... / ehe ... (capitalised where a sentence starts); {s1}..{s4} spots as phrases, {p1}..{p4} as nouns;
        {r1}..{r4} people
of the town and {g1}..{g4} what they give; {n} = {m} + {rest}, {sum} = {n} + {m}; and the table columns.
"""

RULES = {
    "hs": "[~said {H}|{H} said|answered {H}]",
    "fs": "[~said {F}|{F} said|{F} told {H}]",
    "es": "[~said {E}|{E} said|said {E} [kindly|softly|with a wink|gravely]]",
    "then": "[~Then|After that,|Next,]",
    "soon": "[~Soon|Before long|A little later]",
    "so": "[~So|And so|That is why]",
    "at_last": "[~At last|Finally,|In the end]",
    "went": "[~walked|hurried|made {his} way]",
    "theywent": "[~walked|hurried|made their way]",
    "sad": "[sad|gloomy|miserable|sorry|heavy-hearted|downcast]",
    "glad": "[glad|delighted|pleased|overjoyed|happy|thankful]",
    "looked": "[looked|searched|hunted|peered]",
    "q": "/ [~Question:|Can you recall:|Now tell me:]",
    "a": "[~Answer:|That is right:|The answer is:]",
    "open": """[~[Once|Once upon a time|Long ago] there [was|lived] {a_trait} {child} named {H}, whose home
        was {a_land}
        [called|by the name of] {town}.
        |{H} was {a_trait} {child} of {age} who lived in {town}, [which was|a place that everyone knew as]
        {a_land}.
        |In {town}, {a_land} [far from the sea of cities|with more chimneys than clocks|where everybody knew
        everybody|that few maps showed], lived {a_trait} {child}. [{His} name was {H}|Everyone called {him}
        {H}].]""",
    "friend": """[~{His} [best|closest|dearest] friend was {F}, a {fchild} who loved {flike}.
        |{F}, {fhis} head full of {flike}, lived [next door|across the lane|two doors away] and was {his}
        best friend.
        |{He} [did|shared] almost everything with {his} friend {F}, who was {ftrait} and liked {flike}.]""",
    "elder": """[{E} [lived|worked] close by and [knew a great deal|had an answer for most things|noticed
        everything|was never in a hurry].|Everyone in {town} trusted {E}, who [smelled of peppermint|walked
        with a
        carved cane|wore round glasses|hummed all day|kept {ehis} pockets full of string].]""",
    "pet": """[~{H} had {a_pet} named {P}, [a {petlook} creature that|which] [followed {him}
        everywhere|slept at the
        foot of {his} bed|liked {treat} better than anything].
        |{P}, {his} {petlook} {pet}, [went wherever {he} went|was never far behind|would do anything for
        {treat}].
        |With {H} lived {a_pet}. It was called {P}, and it was [{petlook} and clever|{petlook} and a bit
        greedy|as
        {petlook} as could be].]""",
    "when": """[~One {season} {daypart}, when {weather}, |It was {a_season} {daypart}, and {weather}. That day
        |On {a_season} {daypart} {weather}. It was then that ]""",
    "dress": "[ {H} put on {his} {wear} and set off.| First {he} looked for {his} {wear}.|||]",
    "hunt": """[They lifted every [stone|board|leaf|sack|mat].|They crawled on hands and knees.|They asked
        everyone who
        passed.|They [pushed|kicked] the [dust|leaves|straw] aside.|They called to each other as they
        searched.|]""",
    "nothing": """[there was nothing but [dust|cobwebs|an old boot|a rusty nail|a sleepy beetle|dry
        leaves|a broken plate]|all they found was [a button|a bent spoon|a torn glove|a puddle|a snail|an
        empty jar]]""",
    "aside": """[ A [cart|boy with a bucket|flock of pigeons|postman|stray goat|girl with a broom] went by.
        | Somewhere a [bell rang|door banged|rooster crowed|kettle whistled|baby laughed].
        | The [light|shadow] [crept|moved] slowly over the [wall|ground|path].
        | {F} hummed [a marching song|a tune with no end|the same three notes].
        | {H} [chewed {his} lip|scratched {his} nose|tugged at {his} sleeve|counted to ten].||||||]""",
    "home": """[The {daypart} was nearly over|It was getting late|The lamps were being lit|Supper was
        ready], and they
        [walked home|went home] [arm in arm|side by side|singing|past {p4}|with tired feet].""",
    "trait_end": """[ From that day on, people said that nobody was as {trait} as {H}.| "You really are
        {trait}," <fs>.
        | It had been a good day to be {trait}.||||]""",
}

PLOTS = {
    "lost": """[~|The Lost {Noun}/|]<open> <friend>
        / {H} had {a_thing} with {mark}. [It was a present from {E}, and|{E} had given it to {him}, and|It
        came from {E}, so] {he} [{used} every day|liked to {use} whenever {he} could]. <when>{he} [took it
        along to play|carried it out to play] {s1}[ and|, and then] {he} {used} [until noon|for an hour|until
        {he} was tired|all alone].
        / [But on the way home|When {he} got back|At bedtime] the {noun} was [gone|missing|nowhere to be
        seen]! {H} felt <sad>. "I have lost my {thing}," {he} told {F}. [?[~"{E} gave it to me."|"What will
        {E} think?"|"I was so careless."]] [~"We will find it," <fs>.|"Do not cry," <fs>. "Two can search
        better than one."|"Where did you have it last?" {F} asked.][?<dress>][?<aside>]
        / First they <looked> {s2}, but <nothing>. [?<hunt>] <then> they <theywent> to {p3}. [?[Again|There
        too], <nothing>.] [?"[Think|Think hard]," <fs>.] "Where did you play [today|with it]?" [?{H} closed
        {his} eyes.|{H} thought and thought.] "I was {s1}!" {he} [cried|shouted].
        / They [ran|raced|rushed] back to {p1}. <at_last> {F} [saw|spotted|noticed] something {color}. It
        was the {noun}! {H} turned it over, and there was {mark}[, just as before|, so there was no
        mistake|]. "Thank you, {F}," <hs>. [?{He} let {F} {use} [first|all the way home].|{He} promised
        to keep it safe.|That night the {noun} lay beside {his} pillow.] [{H} learned [to look where {he}
        had started|that a friend's eyes are worth a lot|to take better care of what {he}
        loved].|][?<trait_end>][?<q> where was the {thing}? <a> it was {s1}.|<q> who found the {noun}?
        <a> {F} did.||]""",
    "quarrel": """<open> <friend> [They had [known each other for {many} years|never once quarreled].|]
        / <when>{H} sat {s1} with {a_thing}. "May I {use}?" asked {F}. "[Not yet|Wait a minute]," <hs>. But
        {F} [did not want to wait|had waited long enough]. {Fhe} [grabbed|snatched at] the {noun}, {H} pulled
        [back|hard], and [crack|snap|bang]! [It fell to the ground|It dropped between them], and now there
        was a [split|dent|tear|hole] in it. "[Look what you did|You broke it]!" shouted {H}. "[You pulled
        too|It was your fault]!" shouted {F}. {Fhe} [stamped|stormed|marched] off to {p2}, and {H} [sat down
        alone|stayed alone] {s1}.[?<aside>]
        / [Without {F}|Alone], [the {daypart} was very long|nothing was any fun|even {like} seemed dull]. {H}
        looked at the {thing} and felt <sad>. <soon> {E} came by. "Why [so quiet|the long face]?" {ehe}
        asked. {H} told {ehim} [everything|the whole story]. "Hm," <es>. "[The {noun} can be mended. Can a
        friendship?|Which would you miss more, the {noun} or {F}?|Somebody has to be the first to say
        sorry.]"
        / [?{H} [thought about that|knew the answer].] {He} <went> to {p2}, where {F} was [drawing lines
        in the dust|kicking a pebble|staring at nothing]. "I am sorry that I shouted," <hs>. "I am sorry
        that I grabbed," <fs>. [?[They both [laughed|smiled|sniffed].|]] <then> they took the {noun} to
        {E}, who had [glue and thread|a little pot of glue|needle, wire and paste]. {F} held it
        [still|tight] while {H} [worked|patched it]. The {thing} was [not as good as new|a little
        crooked], but it was whole. [?"You {use} first," <hs>. "No, [you|we take turns]," <fs>.] [?After
        that they [shared the {noun}|took turns, {many} minutes each].|The mark stayed on it, and it
        reminded them of the day they made up.] [?Saying sorry is [hard|a small thing], but it mends
        [more than glue does|a lot].] [?<q> what did they quarrel about? <a> {a_thing}.|<q> where did {F}
        go? <a> to {p2}.||]""",
    "build": """[~|The {Build}/|]<open> <friend>
        / <when>{H} had an idea. "Let us build {a_build}," <hs>. They wanted it {purpose}. [?{F} clapped
        {fhis} hands.|{F} liked the plan at once.|"Can we do that?" {F} asked. "We can try," <hs>.] [?They
        [drew a plan on a paper bag|made a list].] They needed {sum} {parts}, {a_tool} and {extra}.
        / They found {n} {parts} {s1} and {m} more {s2}. [?"{N} and {m} make {sum}," {F} [counted|said].
        "That is enough."] {E} lent them the {tool}. "[Bring it back tonight|Bring it back clean|Mind your
        fingers]," <es>. The last thing was {extra}, and that was [harder to find|not easy]. [?They asked the
        {r1}, who had none.|They asked at the {r1}'s, but it was closed.] <then> they asked the {r2}, who
        [had just what they wanted|gave it to them for a smile|only wanted a [song|joke|story] in
        return].[?<aside>]
        / All {daypart} they worked {s3}. {H} used the {tool} and {F} [held the {parts}|counted the
        {parts}|kept everything straight]. [Once|Twice] the {build} [fell over|came apart|leaned like a tired
        man]. "[It is no use|We will never finish]," [groaned|sighed] {F}. "[One more try|We still have all
        {sum} {parts}]," <hs>. [?{He} was too [stubborn|proud|busy] to stop.] They began again, [more
        slowly|from the bottom], and this time it held.
        / <at_last> they put {extra} in place, and the {build} was [ready|finished|done]. {H} took the
        {tool} back to {E}, [as {he} had promised|and thanked {ehim}]. [?"[Well made|That is fine work],"
        <es>.] [The {r2} came to look, too.|] [~The {build} stood {s3} for {many} years.|Everyone in
        {town} came to see it {s3}.|They painted it {color} the very next day.] [?Big things are made of
        small ones, [one at a time|put in the right order].|Two heads and four hands can do a
        lot.][?<trait_end>][?<q> how many {parts} did they use? <a> {sum}.|<q> who lent them the {tool}?
        <a> {E}.||]""",
    "rescue": """<open> <pet> <friend>
        / <when>{H} and {F} were [playing|walking|looking for {like}] {s1}. [All at once|Suddenly] {P}
        [stopped|stood still] and {sound}. [?Something was crying.|There was a small, thin sound.] {P}
        {moved} ahead, and the children followed it to {p2}. There they saw {a_wild}. It was {stuck}!
        / [?"[Poor thing|The poor little thing]," whispered {F}. "We must help it."] "[But how?|What can we
        use?]" <hs>. They tried {bad} first, but {badwhy}. The {wild} [shivered|trembled|blinked at them].
        [?"[Stay with it|Keep it calm]," <hs>.] "I will [get help|run for help]." {He} ran all the way to
        {p3}, where {E} was [mending a chair|sweeping|reading the news|drinking tea]. "Please, {E}, we need
        {good}!" [?{E} [did not ask why|got up at once].] "Take it," <es>. "[Bring it back when you can|Be
        quick, and be gentle]."
        / {H} came back [out of breath|panting] with {good}. {F} was still there, [talking softly|singing
        under {fhis} breath], and {P} sat beside {fhim}. [Slowly|Very carefully], {H} {how}. [?The {wild}
        [did not move|held very still].] [?[One more inch|A little more] and it was free!]
        / [?It was hungry, so {F} found {wildfood} for it, and {P} [watched politely|only sniffed].]
        [~{M} days later|That evening|The next morning] they carried it back to {home}. {H} returned what
        {he} had borrowed to {E}, and {P} got {treat} [for hearing it first|because it had heard the
        cry|as a reward]. [?Sometimes the {wild} came back to look at them.|They never forgot the little
        {wild}.|"Small voices matter," <es>.] [?Be gentle, and [even wild things trust you|the frightened
        will trust you].][?<trait_end>] [?<q> what was {stuck}? <a> {a_wild}.|<q> who heard it first? <a>
        {P} the {pet}.||]""",
    "journey": """<open> <pet>
        / {E} lived [far away|on the other side of {town}], and {ehe} was [ill in bed|having a
        birthday|feeling lonely]. <when>{H} decided to visit {ehim}. "I will bring {a_thing}," <hs>, "because
        {ehe} once had one just like it." {He} wrapped the {noun} in paper, [called|whistled for] {P} and set
        out.
        / The first stop was {p1}. There the {r1} was [trying to lift a box|looking for a lost glove|chasing
        a hat]. {H} [helped|lent a hand], and the {r1} gave {him} {a_g1}. [?"[For the road|Take this to
        {E}]," said the {r1}.]
        / The second stop was {p2}. The {r2} [had a question|had a problem]. "How much is {n} and {m}?"
        "{Sum}," <hs> [at once|without stopping]. The {r2} laughed and gave {him} {a_g2}.[?<aside>] {P}
        {sound} and {moved} on.
        / The third stop was {p3}, and there [the path split in two|the road was blocked]. [?{H} did not know
        the way.] But {P} [sniffed the air|looked left and right], {sound} [once|twice], and {moved} [to the
        left|to the right]. {H} followed, and that was right. The {r3}, who [was resting|stood] there, [saw
        it all|was amazed] and gave {him} {a_g3}.
        / <at_last> they came to {E}'s door. [?"[Come in, come in|What a surprise]!" cried {E}.] {H} put
        everything on the table: the {g1} from the {r1}, the {g2} from the {r2} and the {g3} from the
        {r3}. Last of all {he} unwrapped the {thing}. [?{E} [held it for a long time|had tears in {ehis}
        eyes].] [?"[It is just like mine|You remembered]," {E} said.] [?They [ate|talked|told stories]
        until dark, and {P} had {treat} under the table.] [?A kindness on the way is never a waste of
        time.|The longest road is short with [a friend|{a_pet}] beside you.][?<trait_end>] [?<q> who gave
        {H} the {g2}? <a> the {r2}.|<q> where did {he} get the {g1}? <a> from the {r1}, at {p1}.||]""",
    "contest": """<open> <friend> {R} was the [fastest|proudest|loudest] {rchild} in {town} and had [won|come
        first] {many} times.
        / Every year there was {a_contest} {s1}, and the prize was {prize}. "I am going to win," {R}
        [boasted|told everyone]. [?"[Nobody is better at {contesting}|You two may as well stay home]."] {H}
        wanted [to try|to win] all the same. "[Then we had better practice|I will help you practice]," <fs>.
        For {n} days {H} and {F} practiced {contesting} {s2}. On the first day {H} {mishap}. [?On the second
        day it went no better.|On the second day {he} wanted to give up.] But on day {n} [everything went
        well|there was not one mistake].[?<aside>]
        / The great day came. {E} was the judge. [?"[Ready, steady, go|Begin]!" {ehe} called.] {R} was [in
        front|ahead] from the start. {H} did {his} best, and {F} [cheered|shouted {his} name]. Then,
        [halfway|near the end], {R} {mishap}! [?{Rhe} turned red.|Somebody laughed.] {H} could have [gone
        on|passed {rhim}] and won. [~But {he} knew how that felt.|But {he} remembered {his} own first
        day.|Instead {he} stopped.] "[Let me help you|Come on, I have got you]," {H} said. They finished
        [together|side by side].
        / {E} [scratched {ehis} head|looked from one to the other]. "I have seen [good {contesting}|fast
        work] today," {ehe} said, "but [I liked the helping better|only one of you stopped for another]."
        {Ehe} gave {prize} to {H}. And what did {H} do? {He} [shared it with {R}|said that half of it was
        for {R}]. "I am sorry that I boasted," said {R}. "[Next year we practice together|Will you teach
        me]?" [?After that there were three of them {s2}.|From then on {F}, {R} and {H} were a team.]
        [?Winning is good, but [kindness lasts longer|helping is better].][?<trait_end>] [?<q> what was
        the prize? <a> {prize}.|<q> how many days did {H} practice? <a> {n}.||]""",
    "cooking": """<open> <friend>
        / {E} [was coming to supper|had a cold|was sad that day], and {H} wanted to cook {a_dish}. "It is
        {ehis} favorite," {he} told {F}. <when>they opened the old cookbook. "{N} {main}, some {second} and a
        little {third}," read {F}.
        / But in the kitchen there were only {m} {main}. "{N} take away {m} is {rest}," <hs>. "We need {rest}
        more." [There was [plenty of|enough] {second}, but the {third} jar was empty.|They had {second} but
        no {third} at all.] "I will get the {main}," <fs>, "and you get the {third}."[?<dress>]
        / {F} ran to the neighbors {s1} and came back with {rest} {main} in {fhis} [cap|apron|pockets|arms].
        {H} <went> to {p2}. "Do you have any {third}?" {he} asked the {r2}. "I do," said the {r2}, "but
        [first help me carry this {g2}|I would like a taste when it is ready]." [?"[Gladly|I promise],"
        <hs>.][?<aside>]
        / Now they had [everything|all they needed]. [?They washed their hands.] {F}
        [chopped|prepared|counted] the {n} {main}, {H} [poured in|added] the {second}, and together they
        stirred with the {utensil}. [?Some of it landed on the floor.|A cloud of steam filled the room.|{H}
        got a smear on {his} nose.] [?"Not too much {third}!" [warned|cried] {F}.] Then they waited. [?The
        smell was wonderful.|The smell went all the way to {p3}.]
        / When {E} came in, {ehe} [sniffed|stopped at the door]. [?"Is that my favorite?" {ehe} asked.]
        They ate the {dish} [to the last bite|slowly], and {E} [smiled for the first time that day|asked
        for more]. {H} took a [bowl|plate|dish] of it to the {r2}[, because {he} had promised|, who said
        it was perfect|]. [?Food tastes best when it is shared.|Many hands make a good
        meal.][?<trait_end>][?<q> how many {main} were missing? <a> {rest}.|<q> who had the {third}? <a>
        the {r2}.||]""",
    "surprise": """[~||{F}'s Secret Present/]<open> <friend>
        / In {many} days it would be {F}'s birthday. {H} knew what {fhe} wanted: {a_thing}. [?{Fhe} had seen
        one in the [shop|window] and [talked of nothing else|sighed].] But {H} had only {m} coins, and the
        {noun} cost {n}. [?"I need {rest} more," {he} [thought|said to {himself}].]
        / <when>{H} went to the {r1} {s1}. "[Is there any work for me|Can I help you]?" {He} [swept the
        floor|carried boxes|washed windows] [all {daypart}|until it shone], and the {r1} paid {him} {rest}
        coins. Now {he} had {n}. {He} bought the {thing}, [ran home by the back way|put it under {his} coat]
        and hid it {s2}. Only {E} knew. [?"[My lips are sealed|I will not say a word]," <es>.]
        / But {F} [noticed something|was puzzled]. "Where were you [yesterday|all day]?" {fhe} asked.
        "Nowhere," <hs>, and {his} ears turned pink. "[Come and play|Let us play] {s2}," <fs>. "No!" cried
        {H}. "I mean, let us go to {p3}." {F} was <sad>. "[{He} does not like me anymore|{H} has a secret
        from me]," {fhe} told {E}. {E} only smiled. "Wait," {ehe} said. [?"[A secret is not always a bad
        thing|Some secrets have ribbons on]."]
        / On the birthday {H} [knocked at {F}'s door|called for {F}]. "Close your eyes," <hs>, and {he}
        led {fhim} to {p2}. "Now look!" There, [tied with a bow|wrapped in paper|in a box], was the
        {thing}. [?{F} could not speak.|{F} laughed and cried at once.] "So that is why you were
        nowhere!" {fhe} said, and {fhe} {used} [then and there|until dark]. [?{E} brought a cake with
        {age} candles.|{E} clapped the loudest.] [?The best secrets are [the ones we give away|made for
        somebody else].][?<trait_end>] [?<q> where was the {noun} hidden? <a> {s2}.|<q> who paid {H}
        {rest} coins? <a> the {r1}.||]""",
    "storm": """<open> <pet> <friend>
        / One {daypart} {stormsign}. "There is {a_storm} coming," <es>. "[Get the animals in|Bring everyone
        inside] before it is dark." There were {n} hens {s1} and {m} sheep {s2}, {sum} animals in all. {H}
        went for the hens and {F} went for the sheep. [?{P} {moved} [between them|from one to the other] and
        {sound}.]
        / [?The wind [howled|screamed|shook the doors].] {H} drove the hens in, one by one, and counted: {n}.
        {F} [pushed|led] the sheep through the gate and counted: {m_less}. "One is missing!" cried {F}.
        [?"[It must be outside|We have to find it]!"] {H} took {a_thing}[ from its hook|]. [~"It is {color},
        so you can see me," {he} said.|"If I am lost, look for something {color}."|"I will wave this {noun},"
        {he} said.] Then {he} and {P} went out into the {storm}.[?<aside>]
        / [?They <looked> {s2}, but no sheep was there.] [?They <looked> {s3}. Nothing.] Then {P} {sound} and
        {moved} to {p4}. There stood the sheep, [shaking|wet and frightened]. [?{H} [put an arm around its
        neck|spoke to it softly], but now {he} could not see the house. {He} held up the {noun}. Far away,
        {F} saw something {color} [move|flash] and [rang the bell|shouted with all {fhis} might]. {H} [walked
        toward the sound|followed the sound] with the sheep behind {him}.]
        / "{Sum}!" {F} counted when {H} and {P} were inside, too. [?They [drank hot milk|sat close
        together|dried their hair], and {P} got {treat}.] In the night the {storm} {damage}, but [nobody
        was hurt|everyone was safe]. [?In the morning {E} counted, too, and there were {n} hens and {m}
        sheep.|The {thing} still hangs by the door.] [?A brave heart [counts everyone|leaves no one
        out].][?<trait_end>][?<q> where was the lost sheep? <a> {s4}. |<q> how many animals were there?
        <a> {sum}.||]""",
    "learn": """<open> <friend> [?<elder>]
        / {H} wanted to learn to {skill}. {F} could do it, {E} could do it, and even {R}, who was only
        {many}, could do it. [?"I will [never|not ever] learn it," <hs>. "[Have you tried|How often have you
        tried]?" {E} asked. "[Once|Only once]," {he} [admitted|said].] {E} [laughed|shook {ehis} head]. "I
        needed {n} days. [Try, and count them|Come back when you have counted {n}]." {Ehe} gave {him}
        {a_thing} for luck.
        / <when>{H} began. {He} went to {p1}, where no one could see {him}, and put the {noun} [beside
        {him}|on the ground]. On the first day {trouble}. On the second day {trouble} [again|once more].
        [?[~"Silly {skilling}!" {he} shouted.|{He} wanted to throw the {noun} away.|{He} sat down and cried a
        little.]][?<aside>] On day {m} {F} came by [whistling|with an apple in each hand]. "Let me tell you a
        secret," <fs>. "You have to {tip}." [?"[That is all|Is that everything]?" asked {H}. "That is all.
        [And do not stop|The rest is time]."]
        / <so> {he} went on. [?"{Tip}," {he} told {himself} [every morning|again and again].] [?A little more
        worked each day.] And on day {n} it [happened|went right]: {H} {skilled} as if {he} had done it all
        {his} life! [{He} ran|{He} raced] to {E}. "How many days?" {ehe} asked. "{N}, [just like you|the same
        as you]!" <hs>. [?{E} was <glad>.]
        / [~A week later|The next day|That same {season}] {H} met {Q}, a {qchild} who sat {s2}, looking
        <sad>. "I will never learn to {skill}," said {Q}. {H} smiled. {He} took out the {thing} and gave
        it to {Q}. "[It is for luck|{E} gave it to me]," {he} said. "And here is {F}'s secret: {tip}."
        [?Nobody is born knowing.|What we learn, we can pass on.] [?<q> how many days did {H} need? <a>
        {n}.|<q> who has the {noun} now? <a> {Q}.||]""",
    "trade": """<open> <friend>
        / {H} had {a_g1}, and {he} did not need it. What {he} wanted was {a_thing} like the one that {E}
        had[, with {mark}|]. [?"[Nobody will swap such a thing|One is not worth the other]," <fs>. "[We shall
        see|Not in one step]," <hs>.] <when>{he} set out with the {g1}.
        / {s1_cap} {he} met the {r2}. "[I have wanted one of those for a week|Just what I need]," said the
        {r2}, and gave {him} {a_g2} for the {g1}. {s2_cap} stood the {r3}. "Is that {a_g2}? I will give you
        {a_g3} for it." <so> the {g2} went to the {r3}, and {H} <went> on with the {g3}.[?<aside>]
        / <then> {he} came to {p3}. [?The {r4} sat there with a [frown|long face].] "I have {a_g4}," said the
        {r4}, "but what I want is {a_g3}." [?"[Then this is your lucky day|What luck]!" <hs>.] [?They shook
        hands on it.|It was a fair swap.]
        / Now {H} had {a_g4}. {He} carried it to {E}. "[My goodness|Well, well], {a_g4}!" <es>. "I have
        looked for one [everywhere|all year]. What do you want for it?" {H} pointed at the {thing}. [?{E}
        [thought for a moment|rubbed {ehis} chin] and nodded.] "[It is yours|You may have it]," {ehe} said.
        / [?{F} [could not believe it|stared]. "[How did you do it|You started with {a_g1}]!" "The {g1}
        became the {g2}, the {g2} became the {g3}, the {g3} became the {g4}, and the {g4} became this,"
        <hs>.] [?And {he} [let {F} {use} first|{used} for {fhim}].] [?What one does not need, another has
        long been wishing for.|Small steps go a long way.][?<trait_end>] [?<q> who has the {g2} now? <a>
        the {r3}.|<q> who wanted {a_g3}? <a> the {r4}.||]""",
    "promise": """<open> <friend>
        / {F} [had to go away for {n} days|was going to visit an aunt for {n} days]. {Fhe} had {a_pet} named
        {P}, which was {petlook} and [sweet|rather spoiled]. "Will you look after {P}?" {fhe} asked. "It gets
        {treat} every evening, and the gate {s1} must stay shut." "I promise," <hs>, [and they shook
        hands|with a hand on {his} heart].
        / For {m} days all went well. {P} {sound} when {H} came, and every evening {he} brought {treat}.
        <when>{R} came by with {a_thing}. "Come with me to {p2}," said {R}. "You may {use} all {daypart}."
        [?{H} [wanted to|looked at the {noun}]. "I have to feed {P}," {he} said.] [?"[Later is soon enough|It
        will not starve]," said {R}.] {H} hesitated, [and then {he} went|and went along], and [in {his}
        hurry|without thinking] {he} left the gate open.
        / They played until {he} heard the evening bell. "{P}!" {he} [cried|gasped]. {He} ran to {p1}. The
        gate [stood open|swung in the wind], and {P} was gone! [?"[I promised|What have I done]," {he}
        [whispered|groaned].] [?{R} had run after {him}. "[It is my fault as well|I will help you search],"
        {rhe} said.] [?They <looked> {s3}, but <nothing>.][?<aside>]
        / <then> {H} had an idea. {He} held up {treat} and [stood very still|waited {s4}]. Far off, something
        {sound}. Out of the dusk {P} {moved}, straight to {him}. [?{H} hugged it [hard|tight], and this time
        {he} shut the gate [twice|with a knot].]
        / After {n} days {F} came home. "Was everything all right?" {fhe} asked. {H} could have said yes.
        But {he} [told the truth|told {fhim} about the gate, and {R}, and the search]. [?{F} was
        [quiet|silent] for a while.] [?"You told me," <fs>. "<so> I can trust you."] [?A promise is a
        small gate: [keep it shut|it must be kept].|Telling the truth is part of a promise.][?<q> what
        was left open? <a> the gate {s1}.|<q> what did {P} eat? <a> {treat}.||]""",
    "garden": """<open> <friend>
        / One spring {daypart} {E} gave {H} a paper bag. In it were {n} {seed}. "[Plant them well|Give them
        sun and water]," <es>, "and [give some away|save a few for me] at the end." {H} and {F} dug a bed
        {s1}, [in two neat rows|with an old fork]. {H} watered it every morning and {F} every evening.
        / For {many} days [nothing happened|there was only mud]. [?"[Maybe they are asleep|Did we plant them
        upside down]?" <fs>.] Then one green tip [showed|poked out], and another, until there were
        {n}.[?<aside>] But the next morning there were fewer. {Pest} had come in the night! "{N} take away
        {m} is {rest}," {H} counted, and {he} felt <sad>.
        / [?"[We could watch all night|We must do something]," <fs>.] [?They asked the {r1}, who only
        [shrugged|laughed].] They asked the {r2}. "Try {guard}," said the {r2}. [?"[It worked for my
        mother|That is what I do]."] <so> they put {guard} around the bed. And it worked! After that not one
        more was [eaten|lost].
        / By [the end of summer|August] there were {crop}, {rest} in all. [?People stopped {s1} to
        look.|The bees came from far away.] {H} remembered what {E} had said. {He} gave [the finest|the
        first] to {E}, one to the {r2} for the good advice, and {F} chose [the biggest of the rest|one
        with a funny shape]. [?"And what about {pest}?" asked {F}. "[They had their {m} already|They have
        been paid]," <hs>, and they laughed.] [?Patience is [water|sunshine] for every garden.|What you
        give away grows again.][?<trait_end>] [?<q> how many were eaten? <a> {m}.|<q> what kept {pest}
        away? <a> {guard}.||]""",
    "treasure": """[~|The Note in the {Noun}/|]<open> <friend>
        / <when>{H} was given an old {noun} that had belonged to {E}. Inside was a [slip of paper|yellow
        note]. "[Start|Begin] {s1}," it said, "and count {n} steps toward {p2}." [?{H} [showed|read] it to
        {F}.] [?"A treasure!" {F} [whispered|cried].][?<dress>]
        / They <theywent> to {p1}. "One, two, three," {F} counted, up to {n}. There was a [loose stone|small
        tin|little bottle] with a second note. "[Well done|Good]. Now look {s3}, where something is {color}."
        They <looked> {s3}. [?[At first|For a long time] <nothing>.][?<aside>] [?{H} wanted to give up.|{F}
        wanted to go home.|It grew late.] Then {a_color} [tile|board|brick|ribbon] [caught {F}'s eye|caught
        {H}'s eye]. Behind it was the third note. "Take {m} steps back, and [dig|look down]."
        / They took {m} steps back and [dug|scraped the earth away]. <soon> there was a [clunk|scratch|dull
        sound]. It was a [tin box|wooden chest|clay jar]! In it lay {a_thing2} with {mark}, and a
        [photograph|picture] of two children. [?[~"I wonder who they are," <hs>.|"Who can they be?" <fs>.|On
        the back somebody had written "best friends."]]
        / They took it all to {E}. [?{E} [sat down|went quite pale|began to smile].] "That is me," {ehe}
        said, "and that is {R}, my best friend. We hid it when we were {age}, and {R} moved away."
        [?[~"Is {rhe} still alive?" asked {F}.|"Where is {rhe} now?" asked {H}.|"Do you miss {rhim}?"
        asked {F}.]] "{Rhe} lives by {p4} again," <es>, "but I never dared to knock." {H} took {E} by one
        hand and {F} took the other. They knocked, and when {R} saw the {thing2}, {rhe} knew [at
        once|everything]. [?The real treasure was [not in the box|an old friend].][?<trait_end>] [?<q>
        what was in the box? <a> {a_thing2}.|<q> how many steps were there first? <a> {n}.||]""",
    "newcomer": """<open> [{He} loved {like}.|What {he} liked best was {like}.]
        / <when>a new {fchild} came to {town}. {Fhis} name was {F}, and {fhe} [said nothing|hid behind {fhis}
        hair|looked at the ground]. {Fhe} always carried {a_thing} with {mark}. At noon {F} sat alone {s1}.
        [?"[Why is {fhe} so quiet|{Fhe} is strange]," said {R}. "[Maybe {fhe} is homesick|I think {fhe} is
        only shy]," {H} said.]
        / {H} went to {p1}. "We are playing {game}," {he} said. "Do you want to come?" {F} shook {fhis} head.
        The next day {H} tried again. "The rule is easy: {rule}." Again {F} shook {fhis} head, but [{fhe}
        almost smiled|not so fast]. On the third day {H} did not ask anything. {He} [sat down|just sat]
        beside {fhim} and [shared {his} bread|talked about {like}]. "[I like {like} too|My brother liked
        {like}]," said {F}. [?It was the first thing {fhe} had said.|{Fhis} voice was soft.][?<aside>]
        / <then> {F} showed {him} the {noun}. "My grandmother gave it to me when we [moved|left]," {fhe}
        said. "[We came from the [north|south|east|west|mountains|islands]|It was made in the
        [north|south|east|west|mountains|islands]], {n} days from here." "[May I see|Can you {use}]?" asked
        {H}. {F} nodded, and {fhe} {used}. [?{R} and the others came [nearer|closer] to watch. "[Do it
        again|That is wonderful]!" cried {R}.]
        / "Teach us," <hs>, "and we will teach you {game}." And that is what they did. They played {s2}
        until supper, and when it was {F}'s turn to {rule}, nobody laughed [louder|more] than {F} and
        {H}. [{E}, who was passing, smiled to see it.|] [?"[Tomorrow again|Same time tomorrow]?" asked
        {R}. "Yes," said {F}, "and I will bring the {thing}."] [?A friend is a stranger who was asked
        [three times|once more].|Being kind [costs nothing|needs patience].][?<trait_end>] [?<q> who gave
        {F} the {noun}? <a> {fhis} grandmother.|<q> where did {F} sit alone? <a> {s1}.||]""",
    "noise": """[~||The Noise at Night/]<open> <pet> <friend>
        / <when>{F} came to stay the night. They talked about {like} and {flike}, blew out the candle and lay
        down. It was [dark|very dark] and still. Then they heard it: {noise}. [?"[What is that|Did you hear
        it]?" whispered {F}.] It came from {p1}. {P} [lifted its head|woke up] and {sound}.
        / [?"It is a [ghost|troll|robber|monster]," <fs>, and pulled up the blanket. "[I do not believe in
        them|There is always a reason]," <hs>, but {his} [knees shook|heart beat fast].] [?There it was
        again: {noise}.] [?They counted to {n}. It came once more.|It came {n} times, and then it stopped,
        and then it came again.] "If we do not look, we shall never sleep," {H} [decided|said]. {He} took
        {a_thing} in one hand, [in case of need|just to have something to hold], and {F}'s hand in the
        other.[?<aside>]
        / They crept to {p1}. {P} {moved} ahead, [not afraid at all|sniffing]. [?The [floor|ground] was cold
        under their feet.] [?{F} bumped into something and squeaked. It was only [a bucket|a coat on a hook|a
        broom|their own shadow].] {Noise}! Now it was very near. {H} [lifted the lamp|took a deep
        breath|pushed the door]. And what did they see? It was {cause}!
        / They [laughed|giggled] until [they had to sit down|{P} {sound} again]. <then> they {fix}, gave
        {P} {treat} and went back to bed. In the morning they told {E}. [?"[I was afraid too, at your
        age|The dark is full of such things]," <es>. "[But you went and looked|Now you know]."] {H}
        [hung|put|laid] the {thing} on the shelf[. {He} had not needed it|, where it belonged|]. [?Most
        monsters are small [when you look at them|in the light].][?<trait_end>] [?<q> what made the
        noise? <a> {cause}.|<q> what did {H} carry? <a> {a_thing}.||]""",
    "market": """<open> <friend> [?<elder>]
        / {E} had made {sum} {wares}, but {ehis} [foot|knee|back] hurt, and it was market day. "We will sell
        them for you," <hs>. "[One coin each|A coin for each, and no less]," <es>. "With {sum} coins I can
        buy {wanted}." <when>{H} and {F} loaded the {wares} onto a cart.
        / They set up {s1}. [?In the first hour nobody [came|stopped].] [?"[We should shout|Nobody sees us],"
        <fs>.] [?{H} climbed on a box and [sang|rang a bell|called out loud|waved {a_color} flag], and [heads
        turned|people stopped].] The {r1} bought {n} at once. "{Sum} take away {n} is {m}," {F} counted.
        [?"[Only {m} left|{M} to go]!"][?<aside>]
        / Then [rain began to fall|a dog ran between the stalls|the wind tipped the cart]. They [ran|moved]
        to {p2}, and there sat a [beggar|small child|tired traveler] who [looked at the {wares}|had nothing].
        {H} looked at {F}. {F} nodded. {H} gave one away [for nothing|as a gift]. [?"[Now we are one coin
        short|{E} will be one coin short]," {he} [thought|said].] The {r2} had [seen it|watched them]. "What
        is left?" asked the {r2}. "{M_less}," <fs>. "I will take them all, and here are {m} coins," said the
        {r2}. "[One extra, for the one you gave away|I can count, too]."
        / <home> "{N} and {m} make {sum}," <hs>, and put the coins into {E}'s hand. [?They told {ehim}
        [everything|about {p2} and the {r2}].] [?{E} was <glad>.] [~The next week|Soon after|On the next
        market day] {E} bought {wanted}. [?"[You are good sellers|Honest counting, warm hearts]," {ehe}
        said.] [?What is given away is not always lost.|Good sums and good hearts go
        together.][?<trait_end>][?<q> how many did the {r1} buy? <a> {n}.|<q> who paid one coin extra?
        <a> the {r2}.||]""",
    "mystery": """[~|The Missing {Goody}/|]<open> <pet> <friend>
        / <when>{E} set {sum} {goody} on the sill to cool {s1}. When {ehe} came back, there were only {n}.
        "{M} are gone!" cried {E}. [?"Who took my {goody}?"] [?{H} [sharpened a pencil|took out {a_thing}].
        "[We will find out|Leave it to us]," {he} told {F}.]
        / "[Who was near {p1}|Who has been here]?" asked {F}. First they asked {R}, who was {s2}. "I was
        [skipping rope|asleep|thinking of {flike}]," said {R}, and showed {rhis} clean hands. <then> they
        asked the {r1} {s3}. "Not I," said the {r1}. "[I was busy with {a_g1}|All I had today was {a_g1}]."
        [?{H} wrote it [down|all down].] [?So it was not {R}, and it was not the {r1}.][?<aside>]
        / "Let us look at the ground," <hs>. {F} [bent down|knelt]. There were {trail}, one here and one
        there, that led away from {p1}. [?They followed the trail past {p2} and past {p3}, [on tiptoe|without
        a word].] It ended {s4}. Something there {sound}. It was {P}! Its face was [very full|not clean], and
        beside it lay the last of the {m} {goody}.
        / [?"{P}!" cried {H}. "I gave you {treat} [this morning|only yesterday]." {P} {sound}
        [softly|once] and looked so <sad> that {E} had to laugh.] "[Case closed|Well solved], {H}," {E}
        said. "{N} are left, and that is enough for us all." [?{H} said sorry to {R} and to the {r1},
        because [it is not nice to be asked such things|they had been suspected for nothing], and each of
        them got one.] [?{P} got none[, of course|].] [?Follow the trail and not the talk.|Ask first,
        look closely, and blame last.][?<trait_end>][?<q> who took the {goody}? <a> {P} the {pet}.|<q>
        how many were taken? <a> {m}.||]""",
}
