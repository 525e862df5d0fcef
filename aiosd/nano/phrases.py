"""The words that nano's tasks are made of: vocabulary, facts, word problems and phrases.

Phrases are templates: `[a|b]` is a choice, `{x}` a slot. A phrase that begins with a small letter is an order, to
which polite words may be added; any other is used as it is. Each list of words has a HELD twin that is used only by the
tests and the benchmarks. Of the phrases, `tasks.py` holds some back by their checksum.

Lines may be long: a phrase that is not broken is easier to read and to compare.
"""

COMMON = """
able about above across after again against air all almost along already also always among and animal answer any
apple arm around ask away baby back bad bag ball bank basket battery beach bean bear beautiful because bed before
begin behind believe below best better between big bike bird black blue boat body book both bottle bottom box boy
bread break breakfast bridge bright bring brother brown brush budget build bus busy butter button buy cable cake call
camera camp car card care carry case cat catch chair chance change cheap check cheese child choose circle city class
clean clear clock close cloth cloud coat code coffee cold colour come company cook cool copy corner correct cost cotton
could count country cover cow cream cross cup cut dance danger dark date daughter day dead deep deliver dentist desk
different dinner dirty doctor dog done door double down draft dream dress drink drive driver dry duck dust each ear
early earth east easy eat edge egg eight empty end engine enough evening event every example eye face fact fail fall
family far farm fast father feather feed feel few field fight file fill final find fine finger finish fire first fish
five fix flag flat flight floor flower fly fog fold follow food foot forest forget fork four free fresh friend from
front fruit full fun game garden gate gift girl give glad glass glove gold good grass great green grey ground group
grow guest guitar half hall hammer hand happy hard hat have head hear heart heavy hello help here hide high hill hold
holiday home honey hope horse hospital hot hotel hour house how hundred hurry ice idea important inside island jacket
job join juice jump just keep key kind kitchen knee knife know ladder lake lamp land large last late laugh lazy leaf
learn leave left leg lemon lesson letter level library light like line list listen little live long look lose loud
love low luck lunch machine mail main make many map market match maybe meal mean measure meat meet meeting member
memory message middle milk mind minute mirror miss mix moment monday money month moon more morning most mother
mountain mouse mouth move much music must nail name near neck need never new news next nice night nine noise north
nose note nothing now number nurse ocean off offer office often oil old once one onion only open orange order other
our out outside over own page paint pair paper parcel parent park part party pass past path pay peace pear pen pencil
people pepper phone photo piano picture piece pig pilot place plan plane plant plate play please pocket point police
poor port pot potato power present price print printer prize project pull pump purple push put queen question quick
quiet rabbit radio rain ready real red release remind rent repair reply report rest result rice rich ride right ring
river road rock roof room rope rose round row rule run sad safe salad salt same sand save say school science screen
sea season seat second secret see seed sell send server seven shade shape share sharp sheep ship shirt shoe shop short
show shower shut sick side sign silver simple sing sister sit six size skin sky sleep slow small smart smell smile
smoke snow soap sock soft some song soon sound soup south space speak spoon sport spring square stamp stand star start
station stay step still stone stop store storm story street strong student sugar summer sun sunday supper sure sweet
swim system table take talk tall task tax tea teacher team ten tent test thank that the their then there thick thin
thing think three through throw ticket tie tiger time tired today together tomato tomorrow tool tooth top tower town
toy track trade train travel tree trip trouble truck true try tuesday turn twelve twenty two umbrella uncle under until
update upper use useful valley very village visit voice wait walk wall want warm wash watch water wave way wear weather
week weekend welcome well west wet what wheel when where while white who wide wild win wind window winter wise wish
with wolf woman wonder wood word work world worry write wrong yard year yellow yes yesterday yet you young zebra zero
""".split()

NAMES = """
Anna Tom Maria Peter Lucy Omar Nina Sam Clara Hugo Ella Ben Zoe Max Ivy Leo Rosa Carl Emma Noah Mia Liam Ruth Adam Sara
David Laura Paul Julia Mark Alice Simon Helen Oscar Eva Victor Grace Felix Diana Martin Jane Lukas Sofia Daniel Amy
Robert Kate Henry Olga Frank Lena George Rita Ivan Nora Eric Marta Jack Tina Hassan Priya Chen Yuki Ahmed Fatima Kofi
Ingrid Pablo Carmen Raj Mei Layla Bruno Greta John Mary James Bob Lisa Susan Linda Michael Karen Steve Emily Jake
""".split()
NAMES_HELD = """
Quentin Beatrix Wilma Thaddeus Imogen Percy Odette Rufus Saskia Barnaby Winona Ezra Dorothea Lionel Petra Mungo Hattie
Caspian Yolanda Fergus
""".split()

SYLLABLES = """
ba be bi bo bu da de di do du fa fe fi fo fu ga ge gi go gu ha he hi ho ka ke ki ko ku la le li lo lu ma me mi mo mu na
ne ni no nu pa pe pi po pu ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we wi ya yo za ze zi zo bra cle
dri fro gla kri plo qua sha sti tho tra chi cha ster ton ley mond berg ford land stone field ment ing ness cat sun ax el
or in an us
""".split()
SYLLABLES_HELD = "fy jax wub yed quo zyl vex gwen hoo pyr skee omb unt irk oss".split()

STEMS = """
notes todo shopping list data report readme config budget results output summary plan letter numbers total prices log
diary journal recipe recipes inventory sales invoice draft temp test a b c x y in out answer answers input values score
scores temperature weights count stock travel trip agenda minutes contacts memo story poem ideas settings info story2
file1 file2 file data1 data2 part1 part2 day1 week2 jan feb march q1 q3 backup archive expenses income rent items
orders greeting hello names addresses guests menu song quote message status errors events tasks
""".split()
STEMS_HELD = """
ledger quota wishlist roster manifest blueprint checklist receipts itinerary glossary harvest catalogue packing tally
dispatch
""".split()
SUFFIXES = "txt txt txt txt txt txt md md csv json log cfg dat text ini yaml html py".split()
FOLDERS = "data docs files work home backup tmp notes reports projects out private logs".split()
FOLDERS_HELD = "vault cabinet shelf".split()

COLOURS = "red blue green yellow black white purple orange pink brown grey silver gold turquoise".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday tomorrow today".split()
MONTHS = "January February March April May June July August September October November December".split()
CITIES = """
Paris London Berlin Rome Madrid Lisbon Vienna Oslo Tokyo Cairo Lima Boston Chicago Delhi Prague Dublin Athens Zurich
Munich Hamburg Leeds Geneva Naples Warsaw
""".split()
CITIES_HELD = "Reykjavik Valparaiso Timbuktu Ljubljana Gdansk Tbilisi".split()
THINGS = """
apples pears books pens eggs bottles chairs tickets coins stamps marbles cookies cakes sweets oranges bananas toys
pencils cards stickers balls flowers plants trees birds cats dogs sheep cows students people guests boxes plates cups
shirts shoes hats socks bags stones shells photos songs videos pages letters emails parcels bricks tiles screws nails
batteries lamps phones laptops tables candles balloons muffins sandwiches pizzas lemons tomatoes potatoes carrots
onions grapes kilos litres points seats rooms windows doors chocolates pancakes buttons keys roses bulbs loaves cans
""".split()
THINGS_HELD = "walnuts kites buckets ribbons turnips medals pebbles lanterns pumpkins feathers".split()
CONTAINERS = (
    "box bag crate basket packet pack carton jar bottle shelf row tray case drawer bus table carriage team".split()
)
CONTAINERS_HELD = "barrel hamper sack rack".split()
CURRENCY = ["euros", "dollars", "pounds", "francs", "coins", "cents", "credits"]
OWNERS = """
my|my|my|my|our|my sister's|my brother's|my mother's|my father's|my wife's|my husband's|my son's|my daughter's|my boss's|
my friend's|my neighbour's|my dad's|my mum's|his|her
""".replace("\n", "").split("|")

# Attributes of people, each with the kind of its value.
ATTRIBUTES = [
    ("birthday", "date"), ("dog's name", "name"), ("cat's name", "name"), ("phone number", "phone"),
    ("favourite colour", "colour"), ("favorite color", "colour"), ("favourite food", "word"), ("favourite book", "words"),
    ("wifi password", "code"), ("password", "code"), ("locker code", "code"), ("pin", "number"), ("door code", "number"),
    ("address", "address"), ("email address", "email"), ("shoe size", "number"), ("flight number", "code"),
    ("hotel", "words"), ("room number", "number"), ("car", "words"), ("job", "word"), ("teacher", "name"),
    ("doctor", "name"), ("middle name", "name"), ("nickname", "name"), ("home town", "city"), ("license plate", "code"),
    ("appointment", "when"), ("dentist appointment", "when"), ("size", "number"), ("age", "number"), ("name", "name"),
    ("user name", "code"), ("seat", "code"), ("blood type", "code"), ("favourite number", "number"), ("hobby", "word"),
    ("best friend", "name"), ("anniversary", "date"), ("lucky number", "number"), ("order number", "code"),
    ("bank", "words"), ("boss", "name"), ("team", "words"), ("favourite song", "words"), ("favourite city", "city"),
    ("weight", "number"), ("height", "number"), ("account number", "number"), ("horse's name", "name"),
]  # fmt: skip
ATTRIBUTES_HELD = [
    ("passport number", "code"), ("godmother", "name"), ("parrot's name", "name"), ("library card number", "number"),
    ("favourite dessert", "words"), ("favourite planet", "word"), ("tailor", "name"), ("garage code", "code"),
]  # fmt: skip
SUBJECTS = [
    ("the meeting", "when"), ("the party", "when"), ("the spare key", "where"), ("the wifi password", "code"),
    ("the concert", "when"), ("the passport", "where"), ("the deadline", "when"), ("the train", "when"),
    ("the door code", "number"), ("the server", "word"), ("the password", "code"), ("the exam", "when"),
    ("the ladder", "where"), ("the doctor", "name"), ("the code word", "word"), ("the alarm code", "number"),
    ("the capital", "city"), ("the next meeting", "when"), ("the secret word", "word"), ("the project name", "word"),
    ("the flight", "when"), ("the boss", "name"), ("the new teacher", "name"), ("the gate", "code"),
    ("the plumber", "name"), ("the bike", "where"), ("the umbrella", "where"), ("the sugar", "where"),
    ("the hotel", "words"), ("the wedding", "date"), ("the project deadline", "date"), ("the office", "where"),
    ("the backup server", "code"), ("the lawn mower", "where"), ("dinner", "when"), ("lunch", "when"), ("the bus", "when"),
]  # fmt: skip
SUBJECTS_HELD = [
    ("the rehearsal", "when"), ("the tool box", "where"), ("the vault code", "number"), ("the mascot", "name"),
    ("the picnic", "when"), ("the telescope", "where"), ("the safe word", "word"),
]  # fmt: skip
AMOUNTS = """
the rent|the electricity bill|the bus fare|the ticket price|the price of a ticket|the budget|my budget|the team size|
the number of guests|my salary|the hourly rate|my hourly rate|the gas bill|the water bill|the internet bill|the deposit|
the price of milk|the price|the tax|the fee|the membership fee|my weight|my age|the width|the length|the height|
the distance to work|the room width|the phone bill|the cost of a book|the price of one box|my savings|the fine|
the number of chairs|the number of students|the speed|the discount|the tip|the fuel price|my score|the total|
the insurance|the mortgage|my pocket money|the price of coffee|the entrance fee|the stock|the target
""".replace("\n", "").split("|")
AMOUNTS_HELD = """
the parking fee|the toll|my allowance|the number of seats|the price of a lantern|the ferry fare|the garage rent|
the piano lesson fee
""".replace("\n", "").split("|")

# Notes with a number in them, each with its topic.
VALUED = [
    ("{q} costs {d} {m}", "{q}"), ("{q} costs {d}", "{q}"), ("{q} is {d} {m} [a|per] month", "{q}"), ("{q} is now {d}", "{q}"), ("{q} was {d}", "{q}"), ("{q} = {d}", "{q}"), ("{q}: {d}", "{q}"), ("{n} owes me {d} {m}", "what {n} owes me"), ("{n} is {d} years old", "{n}'s age"), ("I have {d} {w}", "{w}"), ("the {w} weighs {d} kg", "the {w}"), ("there are {d} {w}", "{w}"), ("we have {d} {w}", "{w}"), ("one {w} costs {d} {m}", "one {w}"), ("a {w} costs {d} {m}", "a {w}"), ("{n} earns {d} {m}", "what {n} earns"),
    ("{q} amounts to {d}", "{q}"), ("{n} gave me {d} {m}", "what {n} gave me"), ("the {w} measures {d} cm", "the {w}"),
]  # fmt: skip

# Facts that are sentences: the note, the beginning of a question about it ("What does"), the rest of the question.
SENTENCES = [
    ("{n} likes {w}", "What does", "{n} like"), ("{n} works at {W}", "Where does", "{n} work"),
    ("{n} lives in {c}", "Where does", "{n} live"), ("I parked [the car|my car|] [on level {d}|in {W} street]", "Where did", "I park"),
    ("I lent my {w} to {n}", "Who did", "I lend my {w} to"), ("{n} owes me {d} {m}", "How much does", "{n} owe me"),
    ("I am allergic to {w}", "What am", "I allergic to"), ("I was born in {c}", "Where was", "I born"),
    ("we need {w} and {v}", "What do", "we need"), ("{n} is coming on {day}", "When is", "{n} coming"),
    ("the {w} opens at {t}", "When does", "the {w} open"), ("the {w} leaves at {t}", "When does", "the {w} leave"),
    ("I hid the {w} [under|behind|in] the {v}", "Where did", "I hide the {w}"), ("{n} drives a {W}", "What does", "{n} drive"),
    ("the {w} costs {d} {m}", "How much does", "the {w} cost"), ("I have to call {n} on {day}", "When do", "I have to call {n}"),
    ("I put the {w} [under|behind|in] the {v}", "Where did", "I put the {w}"), ("{n} studies {w} in {c}", "What does", "{n} study"),
    ("the {w} is {v}", "What is", "the {w}"), ("{n} is {d} years old", "How old is", "{n}"),
    ("the {w} starts [on {day} |]at {t}", "When does", "the {w} start"), ("{n} moved to {c}", "Where did", "{n} move"),
    ("I prefer {w} over {v}", "What do", "I prefer"), ("{n} plays the {w}", "What does", "{n} play"),
    ("the {w} belongs to {n}", "Who does", "the {w} belong to"), ("I feed the {w} at {t}", "When do", "I feed the {w}"),
    ("{n} is [my|our] {w}", "Who is", "{n}"), ("I promised {n} a {w}", "What did", "I promise {n}"),
    ("{n} sits next to {o}", "Who does", "{n} sit next to"), ("we meet {n} at the {w}", "Where do", "we meet {n}"),
    ("{n} collects {w}", "What does", "{n} collect"), ("I buried the {w} near the {v}", "Where did", "I bury the {w}"), ("{n} arrives at {t}", "When does", "{n} arrive"), ("I owe {n} {d} {m}", "How much do", "I owe {n}"), ("{n} sold me a {w}", "What did", "{n} sell me"), ("the {w} was built in {c}", "Where was", "the {w} built"),
]  # fmt: skip

REMEMBER = [
    "bear this in mind: {x}", "commit this to memory: {x}", "hold on to this: {x}", "put down that {x}", "{X}. [You must not forget it|You must remember it|Keep a note|Keep it in mind].", "take note that {x}", "I'd be glad if you could remember that {x}", "Please take a note of this: {x}",
    "{any} that {x}", "{any} that {x}", "{any} in [your memory|your notes] that {x}", "[save|store|file|log] that {x}", "register that {x}", "I {any} you to remember that {x}.", "Remember for {any}: {x}", "{any}: remember that {x}", "Keep this in your head: {x}", "for the record: {x}", "You need to know that {x}.", "Please [be aware|know] that {x}.", "store in memory: {x}", "remember that [today |now |]{x}", "{X}. [Keep that|Store that|Save that|Note that|Remember it for me|Learn this]!", "I [told|tell] you: {x}. Remember it.", "let it be noted that {x}", "make a mental note: {x}", "make sure not to forget that {x}", "{X} - [remember that|make a note|note it|don't forget it].", "put on record that {x}", "save as a note: {x}", "new note: {x}", "keep hold of this: {x}",
    "remember that {x}", "remember that {x}", "remember that {x}", "remember this: {x}", "remember: {x}", "note that {x}",
    "make a note that {x}", "make a note: {x}", "keep in mind that {x}", "don't forget that {x}", "do not forget: {x}",
    "take a note: {x}", "take a note that {x}", "memorize that {x}", "memorise this: {x}", "write down that {x}",
    "keep a note that {x}", "store the fact that {x}", "save the fact that {x}", "learn that {x}", "note: {x}",
    "[store|save|keep] this note: {x}", "add a note [that|saying] {x}", "put in your notes that {x}",
    "remember for me that {x}", "remember for later that {x}", "jot down that {x}", "note down: {x}",
    "[keep|remember] the following: {x}", "remember the following fact: {x}", "record that {x}",
    "make sure you remember that {x}", "remember {x}", "[save|store] this for later: {x}", "add to your memory: {x}",
    "You should know that {x}. Remember it.", "{X}. [Please remember that|Remember that|Remember this|Don't forget it].",
    "{X}, [please remember that|remember that|don't forget|keep that in mind].", "Just so you [remember|know]: {x}",
    "For later: {x}", "{X}. [Can|Could] you remember that[ for me|]?", "FYI {x}, [remember that|make a note of it].",
    "{X}. [Make a note of that|Note it down|Keep it in mind|Write that down|Memorize it].", "Remember {x}, ok?",
    "I [want|need] you to [remember|know|note] that {x}.", "[One thing to remember|Something to remember|Note to self]: {x}",
    "It is important that you remember that {x}.", "Here is [something|a fact] to [keep|remember]: {x}",
    "I will need this later: {x}", "Let me tell you something to remember: {x}",
    "bear in mind that {x}", "commit to memory that {x}", "hold on to this fact: {x}", "put down a note that {x}", "{X}. [You must remember that|Keep a note of that].", "Please take note: {x}", "I'd be glad if you remembered that {x}.",
]  # fmt: skip

# {q} is what the question is about; {wh} begins a question ("Where did"), {wi} the same as an indirect question.
RECALL = [
    "I wonder about {q}.", "I am wondering {wi} {q}{tail}.", "refresh my memory: {wh} {q}?", "Could you have noted {q}?", "Could it be that I told you {wi} {q}{tail}?", "go through your notes for {q}", "What was it that I said about {q}?", "bring up what I said about {q}", "tell me about {q}", "Quick: {wh} {q}?", "go and find {q} in your notes", "refresh my memory on {q}",
    "{any} me about {q}", "I {any} {wi} {q}{tail}.", "{any} what you know about {q}", "{any} the note about {q}", "{any} my memory [of|on] {q}", "{wh} {q}, [please|again|do you know|by the way]?", "[Please say|say|tell] {wi} {q}{tail}", "I [don't know|don't remember|have no idea|want to know|would like to know|am not sure] {wi} {q}{tail}.", "Have I told you {wi} {q}{tail}?", "Have I mentioned {q}?", "Did you note {q}?", "Do you have {q}?", "read me the note about {q}", "What note do you have about {q}?", "Do you remember {q}?", "Do you remember what I said about {q}?", "Didn't I tell you {wi} {q}{tail}?", "I told you {wi} {q}{tail}. [Tell me|What was it|Say it again].", "show me the note [on|about] {q}", "Hm, {wh} {q}?", "retrieve {q}", "get {q} from your [notes|memory]", "[let me know|say] {wi} {q}{tail}", "What's the story with {q}?", "What can you tell me about {q}?", "Information about {q}?", "look for {q} in your notes", "Was there [something|anything] about {q}?", "{wi} {q}{tail}?", "What did I note about {q}?", "[Which|What] notes mention {q}?",
    "{wh} {q}?", "{wh} {q}?", "{wh} {q}?", "tell me {wi} {q}{tail}", "Do you [remember|know|recall] {wi} {q}{tail}?",
    "Did I tell you {wi} {q}{tail}?", "[I forgot|I have forgotten|I can't remember] {wi} {q}{tail}.", "remind me {wi} {q}{tail}",
    "look up {wi} {q}{tail}", "Can you remember {wi} {q}{tail}?", "{wh} {q} again?", "What did I [say|tell you] about {q}?",
    "What do you [know|remember] about {q}?", "What do your notes say about {q}?", "What [did you note|have you noted] about {q}?",
    "recall {q}", "look up {q}", "tell me {q}", "look in your notes for {q}", "search your notes for {q}", "find {q} in your notes",
    "find the note about {q}", "check your notes [for|about] {q}", "What have I told you about {q}?", "remind me [of|about] {q}",
    "tell me what [I said|you know|you remember] about {q}", "give me {q}", "Do you have a note [about|on] {q}?",
    "I need {q}.", "I need to know {wi} {q}{tail}.", "{Q}?", "Any idea {wi} {q}{tail}?", "What was {q}?", "find out {wi} {q}{tail}",
    "According to your notes, {wh} {q}?", "Hey, {wh} {q}?", "tell me what was noted about {q}", "Is there [a note|anything] about {q}?",
    "I wonder {wi} {q}{tail}.", "refresh my memory about {q}", "Could it be that you noted {q}?", "go through your notes and tell me about {q}", "Quick question: {wh} {q}?", "What was it I told you about {q}?", "bring up the note on {q}",
]  # fmt: skip
RECALL_ALL = [
    "read all notes", "What's in your memory?", "list what is in your notes", "read your notes to me",
    "What do you remember?", "list [all|] your notes", "tell me everything [you remember|I told you]", "show me all [your|the|my] notes",
    "What have you noted so far?", "What notes do you have?", "What [did|have] I [tell|told] you so far?", "recall everything",
    "read me all your notes", "What is in your notes?",
]  # fmt: skip

READ = [
    "recite what {f} says", "let me see {f}", "show what {f} holds", "What can I find in {f}?", "take a look at {f}", "I am curious what {f} says.", "present {f}", "show the text stored in {f}", "let me see the text of {f}", "take a look at {f} and tell me what it says", "What text is stored in {f}?",
    "{any} {f}", "{any} the file {f}", "{any} me {f}", "{any} the [text|content|contents] of {f}", "{any} out what is in {f}", "[scan|inspect|go through|examine|study|review|peek into|retrieve|access|browse|preview|type out] [the file|] {f}", "I need the [text|contents|content] of {f}.", "I [wonder|need to know] what {f} says.", "What text does {f} [have|hold]?", "{f}: what does it say?", "What's written inside {f}?", "Do you know what {f} says?", "say what is in {f}", "have a look at {f}", "have a look into {f} and tell me what is there", "What does it say in {f}?", "How does {f} read?", "Which words are in {f}?", "{f}?", "let me know what {f} [says|contains]", "bring me the [text|content] of {f}", "What has been saved in {f}?", "Tell me, what is inside {f}?", "show the file {f}", "read me {f}", "I forgot what is in {f}.", "repeat what {f} says",
    "read {f}", "read the file {f}", "show me {f}", "show me the [contents|content|text] of {f}", "What does {f} say?", "open {f}",
    "open {f} and tell me what it says", "What is in {f}?", "What's in the file {f}?", "What's inside {f}?", "print {f}",
    "display [the file|] {f}", "cat {f}", "tell me what is [written|] in {f}", "tell me what {f} [says|contains]",
    "What does the file {f} contain?", "read {f} [aloud|to me|out loud|for me]", "read out {f}", "What is written in {f}?",
    "give me the [contents|content|text] of {f}", "look into {f} and tell me what it says", "What are the contents of {f}?",
    "Which text is in {f}?", "I want to know what is in {f}.", "I'd like to see {f}.", "check {f}", "check what is in {f}",
    "look at {f}", "What do we have in {f}?", "Is there anything in {f}?", "What did I write in {f}?", "get the text from {f}",
    "[load|fetch] {f} and show it", "Could I see what {f} says?", "[output|dump|list] the [contents|content] of {f}", "Contents of {f}?",
    "open the file [called|named] {f}", "read the file [called|named] {f}", "find out what {f} says", "view {f}", "quote {f}",
    "There is a file [called|named|] {f}. What does it say?", "I have a file {f}, read it [to me|please|].",
    "recite the file {f}", "let me see what {f} holds", "What would I find in {f}?", "take a look at {f} and tell me the text", "I am curious about the contents of {f}.", "present the text stored in {f}",
]  # fmt: skip

WRITE = [
    "make a file {f} which holds {x}", "drop the text {x} in {f}", "enter the words {x} into {f}", "let {f} say {x}", "have {f} contain {x}", "leave {x} in {f}", "I would like {x} in {f}.", "I would like to write {x} [to|into] {f}.", "create a new file {f} that [says|contains|holds] {x}", "enter {x} into {f}", "drop {x} in {f}", "let the file {f} contain {x}",
    "{any} {x} [into|to|in] {f}", "{any} {x} [into|to|in] the file {f}", "{any} a file {f} [with|that says|containing|with the text] {x}", "{any} {f} with [the text|] {x}", "{any} the [text|words|line] {x} [into|in|to] {f}", "[insert|place|type|log|record|stick|export|set|leave|deposit] {x} [in|into|to] {f}", "{any} a file [called|named] {f} [with|containing|that says] {x}", "[generate|start|build|prepare|compose|set up] a file [called|named|] {f} [with|containing|that says|that reads] {x}", "write {x} and [save|store] it [as|in|to] {f}", "save a file {f} [that says|with|containing] {x}", "[have|get] {x} written [to|into] {f}", "I'd like {f} to [say|contain] {x}.", "{f} should [say|contain|hold] {x}.", "Make sure {f} [says|contains] {x}.", "Write this: {x}. [Save it|Put it|Store it] in {f}.", "The text {x} [belongs|goes] in[to|] {f}.", "The words {x} [must|should] [go|be written] [to|into|in] {f}.", "new file {f}: {x}", "file {f}, text: {x}", "note down {x} in {f}", "Add {x} to {f}", "write in {f} that {x}", "write down in {f}: {x}", "Please [make|create] {f}. It should say {x}.", "[save|write] to the file {f} the text {x}", "[save|write] in {f} the words {x}", "I want {x} in {f}.", "I need {x} [saved|stored|written] in {f}.", "send {x} to the file {f}",
    "write {x} [to|into|in] {f}", "write {x} to the file {f}", "save {x} [to|in|into|as] {f}", "put {x} [in|into] {f}", "store {x} in {f}",
    "create [a file|the file|] {f} with the [text|content|words] {x}", "create a file [called|named] {f} [containing|that says|that contains] {x}",
    "make a file {f} [with|that says|containing] {x}", "write a file {f} [with|that says] {x}", "write the [text|words|sentence|line|message] {x} [to|into] {f}",
    "save the [text|words|sentence|line|note|message] {x} [to|in|into] {f}", "put the [text|words|sentence] {x} into the file {f}",
    "write to {f}: {x}", "write into {f}: {x}", "save to {f}: {x}", "write the following to {f}: {x}", "save this [to|in] {f}: {x}",
    "create {f} with this text: {x}", "make {f} say {x}", "fill {f} with {x}", "store the [text|line|note] {x} in [the file|] {f}",
    "The file {f} should [say|contain|read] {x}.", "In {f}, write {x}.", "Into the file {f} write {x}.", "I want a file {f} that [says|contains] {x}.",
    "I need a file [called|named|] {f} [containing|with the text|with] {x}.", "note {x} in {f}", "add a file {f} with the content {x}", "set the content of {f} to {x}",
    "[overwrite|replace] {f} with {x}", "keep {x} in the file {f}", "make a new file [called|named] {f} and [write|put] {x} [in|into] it",
    "create {f} and write {x} [in|into|to] it", "open a new file {f} and write {x}", "Text for {f}: {x}", "write down {x} in {f}", "output {x} to {f}",
    "jot {x} down in {f}", "put this into {f}: {x}", "Please have {f} contain {x}.",
    "make a new file {f} that holds {x}", "drop {x} into {f}", "enter {x} in the file {f}", "let {f} contain {x}", "leave the text {x} in {f}", "I would like to have {x} in {f}.",
]  # fmt: skip

# {e} is an expression in signs or in words.
CALC = [
    "I wonder how much {e} is.", "state {e}", "state the result of {e}", "Which number is {e}?", "reckon what {e} is", "What does {e} result in?", "Any idea what {e} is?", "obtain the result of {e}", "What is the number for {e}?", "What's the value of {e}?",
    "{any} {e}", "{any} me {e}", "{any} the value of {e}", "{any} what {e} is", "{any} how much {e} is", "I {any} what {e} is.", "the value of {e}", "What's the [result|answer|value] of {e}?", "Can {e} be calculated?", "give me {e}", "How much does {e} make?", "What {any} is {e}?", "What do I get for {e}?", "If I compute {e}, what do I get?", "{E} is how much?", "math: {e}", "Let me know what {e} is.", "I'd like to know {e}.", "Please, what is {e}?", "show me [the result of|] {e}", "and {e}?", "What about {e}?", "[name|show|print] the [result|answer] of {e}", "What comes out of {e}?", "What is {e} [exactly|equal to|then|please]?", "I need {e}.", "[hey |]how much would {e} make?",
    "What is {e}?", "What is {e}?", "What's {e}?", "whats {e}", "calculate {e}", "compute {e}", "work out {e}", "evaluate {e}", "{E}?", "{E} =", "{E} = ?",
    "{E}", "How much is {e}?", "tell me {e}", "tell me what {e} is", "find {e}", "What does {e} [equal|come to|give|make|evaluate to]?", "solve {e}",
    "give me the [result|answer|value] of {e}", "figure out {e}", "What do you get for {e}?", "I need to know what {e} is.", "What is the [result|value|answer] of {e}?",
    "[do|run] the [math|calculation|sum]: {e}", "Do you know what {e} is?", "What would {e} be?", "determine {e}", "How much would {e} be?", "get {e}", "calc {e}",
    "use the calculator[ to work out|:| for] {e}", "Quick: {e}?", "[work|find] out [what|how much] {e} is", "{E} equals what?", "I have to [compute|calculate] {e}.", "help me with {e}",
    "{E} is what?", "say what {e} is", "How many is {e}?", "return {e}",
    "I wonder what {e} is.", "state the value of {e}", "What number is {e}?", "reckon {e}", "What results from {e}?", "Any idea how much {e} is?", "obtain {e}",
]  # fmt: skip

# Arithmetic in words, each with the expression for calc. {a} is the number that is read first, then {b}, {c}.
WORDED = [
    ("{a} decreased by {b}", "{a} - {b}"), ("{a} lowered by {b}", "{a} - {b}"), ("{a} raised by {b}", "{a} + {b}"), ("{a} enlarged by {b}", "{a} + {b}"), ("the total of {a}, {b} and {c}", "{a} + {b} + {c}"), ("{a} times {b} and then times {c}", "{a} * {b} * {c}"), ("{a} multiplied by {b} and by {c}", "{a} * {b} * {c}"), ("{a} less {b} plus {c}", "{a} - {b} + {c}"), ("{a} over {b} minus {c}", "{a} / {b} - {c}"), ("the product of {a} and {b}, plus {c}", "{a} * {b} + {c}"), ("the product of {a} and {b} minus {c}", "{a} * {b} - {c}"), ("the sum of {a} and {b}, minus {c}", "{a} + {b} - {c}"), ("a half of {a}", "{a} / 2"), ("one third of {a}", "{a} / 3"), ("one tenth of {a}", "{a} / 10"),
    ("{a} plus {b}", "{a} + {b}"), ("{a} plus {b}", "{a} + {b}"), ("{a} and {b} [added together|added up|together]", "{a} + {b}"), ("the sum of {a} and {b}", "{a} + {b}"),
    ("{a} minus {b}", "{a} - {b}"), ("{a} minus {b}", "{a} - {b}"), ("{a} less {b}", "{a} - {b}"), ("the difference [between|of] {a} and {b}", "{a} - {b}"), ("{b} subtracted from {a}", "{a} - {b}"),
    ("{a} times {b}", "{a} * {b}"), ("{a} times {b}", "{a} * {b}"), ("{a} multiplied [by|with] {b}", "{a} * {b}"), ("the product of {a} and {b}", "{a} * {b}"), ("{a} x {b}", "{a} * {b}"),
    ("{a} divided by {b}", "{a} / {b}"), ("{a} divided by {b}", "{a} / {b}"), ("{a} over {b}", "{a} / {b}"), ("the quotient of {a} and {b}", "{a} / {b}"), ("the ratio of {a} to {b}", "{a} / {b}"),
    ("{a} squared", "{a} ** 2"), ("the square of {a}", "{a} ** 2"), ("{a} cubed", "{a} ** 3"), ("{a} to the power of {k}", "{a} ** {k}"), ("{a} to the {k}th power", "{a} ** {k}"),
    ("the square root of {a}", "sqrt({a})"), ("the root of {a}", "sqrt({a})"), ("half of {a}", "{a} / 2"), ("half {a}", "{a} / 2"), ("twice {a}", "{a} * 2"), ("double {a}", "{a} * 2"), ("two times {a}", "2 * {a}"), ("three times {a}", "3 * {a}"),
    ("triple {a}", "{a} * 3"), ("a third of {a}", "{a} / 3"), ("[a|one] quarter of {a}", "{a} / 4"), ("a tenth of {a}", "{a} / 10"), ("{k}% of {a}", "{k}% of {a}"), ("{k} percent of {a}", "{k}% of {a}"), ("{k} % of {a}", "{k}% of {a}"),
    ("the average of {a} and {b}", "({a} + {b}) / 2"), ("the [average|mean] of {a}, {b} and {c}", "({a} + {b} + {c}) / 3"), ("the sum of {a}, {b} and {c}", "{a} + {b} + {c}"), ("the product of {a}, {b} and {c}", "{a} * {b} * {c}"),
    ("{a} plus {b} plus {c}", "{a} + {b} + {c}"), ("{a} plus {b} minus {c}", "{a} + {b} - {c}"), ("{a} times {b} plus {c}", "{a} * {b} + {c}"), ("{a} times {b} minus {c}", "{a} * {b} - {c}"), ("{a} plus {b} times {c}", "{a} + {b} * {c}"),
    ("the sum of {a} and {b}[,|] times {c}", "({a} + {b}) * {c}"), ("the sum of {a} and {b}[,|] divided by {c}", "({a} + {b}) / {c}"), ("{a} times the sum of {b} and {c}", "{a} * ({b} + {c})"), ("{a} minus {b} minus {c}", "{a} - {b} - {c}"),
    ("{a} times {b} times {c}", "{a} * {b} * {c}"), ("{a} times {b} divided by {c}", "{a} * {b} / {c}"), ("the remainder of {a} divided by {b}", "{a} % {b}"), ("{a} modulo {b}", "{a} % {b}"), ("{a} mod {b}", "{a} % {b}"), ("the larger of {a} and {b}", "max({a}, {b})"), ("the smaller of {a} and {b}", "min({a}, {b})"),
    ("the difference between {a} and {b}[,|] times {c}", "({a} - {b}) * {c}"), ("{a} divided by {b} plus {c}", "{a} / {b} + {c}"),
    ("{a} increased by {b}", "{a} + {b}"), ("{a} reduced by {b}", "{a} - {b}"), ("the total of {a} and {b}", "{a} + {b}"), ("{a} multiplied by {b} and then by {c}", "{a} * {b} * {c}"), ("{a} plus {b}, plus {c}", "{a} + {b} + {c}"), ("{a} minus {b} plus {c}", "{a} - {b} + {c}"), ("{a} divided by {b} minus {c}", "{a} / {b} - {c}"), ("the product of {a} and {b}, minus {c}", "{a} * {b} - {c}"), ("the sum of {a} and {b} minus {c}", "{a} + {b} - {c}"), ("one half of {a}", "{a} / 2"),
]  # fmt: skip
# Orders that are arithmetic.
ORDERS = [
    ("increase {a} by {b}", "{a} + {b}"), ("reduce {a} by {b}", "{a} - {b}"), ("decrease {a} by {b}", "{a} - {b}"), ("raise {a} by {b}", "{a} + {b}"), ("lower {a} by {b}", "{a} - {b}"), ("multiply {a} by {b} and take away {c}", "{a} * {b} - {c}"), ("take {b} from {a} and add {c}", "{a} - {b} + {c}"), ("divide {a} by {b} and take away {c}", "{a} / {b} - {c}"), ("multiply the numbers {a}, {b} and {c}", "{a} * {b} * {c}"), ("add the numbers {a} and {b}", "{a} + {b}"), ("take {a} and multiply it by {b}", "{a} * {b}"), ("take {a} and subtract {b}", "{a} - {b}"), ("take {a} and divide it by {b}", "{a} / {b}"), ("subtract {b} from {a}, then add {c}", "{a} - {b} + {c}"),
    ("add {a} and {b}", "{a} + {b}"), ("add {a} to {b}", "{a} + {b}"), ("add [up|together] {a} and {b}", "{a} + {b}"), ("add up {a}, {b} and {c}", "{a} + {b} + {c}"), ("sum {a}, {b} and {c}", "{a} + {b} + {c}"), ("sum up {a} and {b}", "{a} + {b}"), ("subtract {b} from {a}", "{a} - {b}"), ("subtract {b} from {a}", "{a} - {b}"), ("take {b} [away|off|] from {a}", "{a} - {b}"), ("take {b} off {a}", "{a} - {b}"), ("deduct {b} from {a}", "{a} - {b}"),
    ("multiply {a} [by|with|and] {b}", "{a} * {b}"), ("multiply {a}, {b} and {c}", "{a} * {b} * {c}"), ("divide {a} by {b}", "{a} / {b}"), ("divide {a} by {b}", "{a} / {b}"), ("split {a} by {b}", "{a} / {b}"), ("double {a}", "{a} * 2"), ("triple {a}", "{a} * 3"), ("halve {a}", "{a} / 2"), ("square {a}", "{a} ** 2"),
    ("add {a} and {b}[,| and] [then|] multiply [by|the result by|it by] {c}", "({a} + {b}) * {c}"), ("add {a} to {b} and divide [by|the result by] {c}", "({a} + {b}) / {c}"), ("multiply {a} by {b}[,| and] [then|] add {c}", "{a} * {b} + {c}"), ("multiply {a} by {b} and subtract {c}", "{a} * {b} - {c}"),
    ("divide {a} by {b} and add {c}", "{a} / {b} + {c}"), ("subtract {b} from {a} and multiply [by|the result by] {c}", "({a} - {b}) * {c}"), ("raise {a} to the power of {k}", "{a} ** {k}"), ("take {a}, add {b} and subtract {c}", "{a} + {b} - {c}"), ("take {a}, multiply it by {b} and add {c}", "{a} * {b} + {c}"), ("increase {a} by {k}%", "{a} * (100 + {k}) / 100"), ("[reduce|decrease] {a} by {k}%", "{a} * (100 - {k}) / 100"), ("average {a} and {b}", "({a} + {b}) / 2"),
    ("start with {a}, add {b}, then multiply by {c}", "({a} + {b}) * {c}"), ("convert {a} hours to minutes", "{a} * 60"), ("convert {a} minutes to seconds", "{a} * 60"), ("convert {a} km to metres", "{a} * 1000"), ("convert {a} weeks to days", "{a} * 7"), ("convert {a} days to hours", "{a} * 24"), ("convert {a} minutes to hours", "{a} / 60"), ("convert {a} years to months", "{a} * 12"), ("convert {a} kilograms to grams", "{a} * 1000"), ("convert {a} metres to centimetres", "{a} * 100"),
    ("add up the numbers {a} and {b}", "{a} + {b}"), ("multiply {a} by {b}, then take away {c}", "{a} * {b} - {c}"), ("subtract {b} from {a} and add {c}", "{a} - {b} + {c}"), ("divide {a} by {b} and subtract {c}", "{a} / {b} - {c}"), ("multiply the numbers {a} and {b}", "{a} * {b}"), ("add the numbers {a}, {b} and {c}", "{a} + {b} + {c}"), ("take {a} and add {b} to it", "{a} + {b}"),
]  # fmt: skip

# Word problems. a ≥ b where b is subtracted from a; {n} {o} are names, {t} {s} things, {C} a container, {m} a currency.
PROBLEMS = [
    ("{n} sells {a} {t} in the morning and {b} in the [evening|afternoon]. How many {t} is that [in total|]?", "{a} + {b}"), ("{n} [finds|collects|gathers] {a} {t} in the morning and {b} at night. How many is that altogether?", "{a} + {b}"), ("A shop had {a} {t} and sold {b}. How many [are left|{t} are left]?", "{a} - {b}"), ("A [baker|farmer|store] has {a} {t} and sells {b} of them. How many are left?", "{a} - {b}"), ("{n} owns {a} {C}s and every one holds {b} {t}. How many {t} is that?", "{a} * {b}"), ("{n} owns {a} {t} and buys {b} more. How many {t} does {n} own?", "{a} + {b}"), ("{a} {t} are put into {C}s of {b}. How many {C}s are needed?", "{a} / {b}"), ("{a} {t} are packed into {C}s with {b} each. How many {C}s are there?", "{a} / {b}"), ("A worker paints {b} {t} [per|a] day. How many [is that|are there] after {a} days?", "{b} * {a}"), ("{n} makes {b} {t} per day. How many are there after {a} days?", "{b} * {a}"), ("{n} buys {a} {t} for {b} {m} each and pays {c} {m} for shipping. How much is that?", "{a} * {b} + {c}"), ("{n} orders {a} {t} at {b} {m} each, and the delivery costs {c} {m}. What is the total?", "{a} * {b} + {c}"), ("{n} has {a} {t}, gets {b} more and loses {c}. How many are left?", "{a} + {b} - {c}"), ("{n} has {a} {t}. {o} gives {n} {b} more, but {n} loses {c}. How many does {n} have?", "{a} + {b} - {c}"), ("Three [people|friends] share a bill of {a} {m}. How much does each pay?", "{a} / 3"), ("Four friends share {a} {t}. How many does each get?", "{a} / 4"), ("Five people share {a} {m}. How much does each get?", "{a} / 5"), ("Two [friends|sisters|brothers] split {a} {m}. How much does each get?", "{a} / 2"), ("I have {a} {m} in my pocket and {b} {m} at home. How much is that altogether?", "{a} + {b}"), ("I have {a} {m} in cash and {b} {m} on my card. How much do I have?", "{a} + {b}"), ("A trip of {a} km takes {b} hours. How many km is that per hour?", "{a} / {b}"), ("A walk of {a} km takes {b} days. How many km is that a day?", "{a} / {b}"), ("{n} had {a} {m} and [spent|paid] {b} {m} on {t}. How much is left?", "{a} - {b}"), ("How much do {a} {t} cost if one is {b} {m}?", "{a} * {b}"),
    ("A baker makes {a} {t} [an hour|per hour|each hour] for {b} hours. How many [{t} |]is that?", "{a} * {b}"),
    ("{n} works {a} hours [a|per|each] day. How many hours [is that|does {n} work] in {b} days?", "{a} * {b}"),
    ("{n} runs {a} km every [morning|evening|week]. How far is that in {b} [days|weeks]?", "{a} * {b}"),
    ("A ticket is {b} {m}. How much are {a} tickets?", "{b} * {a}"), ("If a [cup|ticket|bottle] costs {b} {m}, how much do {a} cost?", "{b} * {a}"),
    ("If one [apple|pen|brick|stamp] costs {b} {m}, what do {a} cost?", "{b} * {a}"), ("We are {a} people and each pays {b} {m}. How much [is that|do we pay] together?", "{a} * {b}"),
    ("A pack of {t} holds {b}. How many {t} are in {a} packs?", "{b} * {a}"), ("A school has {a} classes of {b} [students|children|pupils]. How many [students|children|pupils] are there?", "{a} * {b}"),
    ("{n} plants {a} rows of {b} {t}. How many {t} [is that|are planted|does {n} plant]?", "{a} * {b}"), ("A {C} weighs {b} kg. How much do {a} {C}s weigh?", "{b} * {a}"),
    ("I drink {b} [cups|glasses] [of water|of tea|] a day. How many do I drink in {a} days?", "{b} * {a}"), ("My heart beats {b} times a minute. How often does it beat in {a} minutes?", "{b} * {a}"),
    ("A [train|car|bike] goes {b} km [an hour|per hour] for {a} hours. How far does it [go|travel]?", "{b} * {a}"), ("{n} types {b} words [a|per] minute. How many words [is that|] in {a} minutes?", "{b} * {a}"),
    ("The rent is {b} {m} [a|per] month. How much is that [for|in] {a} months?", "{b} * {a}"), ("I pay {b} {m} [a|per] month [for the phone|in rent|]. How much is that in a year?", "{b} * 12"),
    ("{n} sleeps {b} hours a night. How many hours is that [a|per|in a] week?", "{b} * 7"), ("I need {b} minutes per page. How long do {a} pages take?", "{b} * {a}"),
    ("{n} has {a} {t} and wants to share them with {b} friends so that each gets the same. How many does each friend get?", "{a} / {b}"),
    ("How many {t} does each [child|person|friend] get if {a} {t} are shared [among|between|by] {b}?", "{a} / {b}"), ("{a} {m} are shared [equally |]by {b} people. How much does each get?", "{a} / {b}"),
    ("A car [uses|needs] {a} litres for {b} trips. How much [is that|] per trip?", "{a} / {b}"), ("A pack of {b} {t} costs {a} {m}. How much is one?", "{a} / {b}"), ("I drove {a} km in {b} hours. What was my [average |]speed?", "{a} / {b}"),
    ("{n} needs to read {a} pages in {b} days. How many pages [is that|] a day?", "{a} / {b}"), ("A farmer puts {a} {t} into {b} {C}s [equally|evenly]. How many are in each?", "{a} / {b}"), ("{a} [students|people|players] form groups of {b}. How many groups are there?", "{a} / {b}"),
    ("We have {a} {m} for {b} days. How much can we spend [a|per|each] day?", "{a} / {b}"), ("A year's salary is {a} {m}. How much is that a month?", "{a} / 12"), ("I want to save {a} {m} in {b} months. How much must I save each month?", "{a} / {b}"),
    ("{n} [bakes|makes|paints|writes|counts|catches] {a} {t} on {day} and {b} on {day}. How many [is that|] in [total|all]?", "{a} + {b}"), ("A [train|bus] has {a} passengers and {b} more get on. How many are on [it|board] now?", "{a} + {b}"),
    ("{n} is {a} years old. How old [will|is] [he|she|{n}] [be |]in {b} years?", "{a} + {b}"), ("One [box|parcel|bag] weighs {a} kg, the other {b} kg. How much do they weigh together?", "{a} + {b}"), ("{n} walks {a} metres to the shop and {b} metres back by another way. How far is that?", "{a} + {b}"),
    ("There are {a} {t} in one {C} and {b} in another. How many are there altogether?", "{a} + {b}"), ("I have {a} {m} and my [sister|brother|friend] has {b} {m}. How much do we have together?", "{a} + {b}"), ("The bill is {a} {m} and I add {b} {m} as a tip. How much do I pay?", "{a} + {b}"),
    ("We were {a} people and {b} more came. How many are we now?", "{a} + {b}"), ("{n} sold {a} {t} in the first week, {b} in the second and {c} in the third. How many in total?", "{a} + {b} + {c}"), ("A library has {a} books and buys {b} [more|new ones]. How many books does it have now?", "{a} + {b}"),
    ("A library has {a} books and {b} are [lent out|borrowed]. How many are left?", "{a} - {b}"), ("There are {a} {t} in the {C}. {n} takes out {b}. How many are left[ in it|]?", "{a} - {b}"), ("{n} was born in {b}. How old is {n} in {a}?", "{a} - {b}"), ("Of {a} {t}, {b} are [red|broken|bad|sold]. How many are not?", "{a} - {b}"),
    ("{n} needs {a} {m} and has {b}. How much is missing?", "{a} - {b}"), ("I bought something for {b} {m} and paid with {a}. How much change do I get?", "{a} - {b}"), ("A trip is {a} km long and we have driven {b} km. How far is it still?", "{a} - {b}"), ("The temperature was {a} degrees and fell by {b}. What is it now?", "{a} - {b}"),
    ("It was {a} degrees and got {b} degrees colder. How warm is it now?", "{a} - {b}"), ("A {a} metre rope loses {b} metres. How long is it now?", "{a} - {b}"), ("{n} weighs {a} kg and loses {b} kg. How much does {n} weigh now?", "{a} - {b}"), ("My phone had {a} percent and lost {b}. What is left?", "{a} - {b}"),
    ("A {a} {m} [coat|phone|jacket|table] is on sale with {k}% off. What does it cost now?", "{a} * (100 - {k}) / 100"), ("{n} earns {a} {m} and gets a raise of {k}%. What does {n} earn now?", "{a} * (100 + {k}) / 100"), ("{n} earns {a} {m} and pays {k}% tax. How much [tax |]is that?", "{k}% of {a}"), ("There are {a} {t} and {k}% [of them |]are [red|new|sold|broken]. How many is that?", "{k}% of {a}"),
    ("{n} buys {a} {t} for {b} {m} and {c} {s} for {d} {m}. How much did everything cost?", "{b} + {d}"), ("A box has {a} layers with {b} rows of {c} {t}. How many {t} are there?", "{a} * {b} * {c}"), ("{n} works {a} hours a day, {b} days a week. How many hours is that in {c} weeks?", "{a} * {b} * {c}"), ("What is the volume of a box of {a} by {b} by {c} cm?", "{a} * {b} * {c}"),
    ("{n} had {a} {t}, gave {b} to {o} and bought {c} more. How many does {n} have now?", "{a} - {b} + {c}"), ("A bus has {a} people. {B} get off and {c} get on. How many are on it now?", "{a} - {b} + {c}"), ("I have {a} {m}, earn {b} {m} and spend {c} {m}. How much do I have now?", "{a} + {b} - {c}"), ("{n} has {a} {C}s with {b} {t} each and gives away {c} {t}. How many are left?", "{a} * {b} - {c}"),
    ("A ticket costs {b} {m} for adults and {d} {m} for children. How much do {a} adults and {c} children pay?", "{a} * {b} + {c} * {d}"), ("{n} buys {a} {t} at {b} {m} each and has a coupon of {c} {m}. How much does {n} pay?", "{a} * {b} - {c}"), ("{a} friends buy a gift for {b} {m} and a card for {c} {m} and share the cost. How much does each pay?", "({b} + {c}) / {a}"),
    ("How long is a film of {a} hours in minutes?", "{a} * 60"), ("How many days are {a} weeks and {b} days?", "{a} * 7 + {b}"), ("How many minutes are {a} hours and {b} minutes?", "{a} * 60 + {b}"), ("How many cents are {a} euros?", "{a} * 100"), ("How many hours are {a} days and {b} hours?", "{a} * 24 + {b}"),
    ("{n} has {a} {t} and [gets|buys|finds|receives|is given] {b} more. How many {t} does {n} have[ now| in total| altogether|]?", "{a} + {b}"),
    ("{n} had {a} {t}. [Then|Later] {o} gave [him|her|{n}] {b} more. How many [are there|does {n} have] now?", "{a} + {b}"),
    ("There are {a} {t} and {b} {s}[ on the table| in the room| in the garden|]. How many [things|items] [are there|are there in total|is that altogether]?", "{a} + {b}"),
    ("{n} [reads|walks|runs|drives] {a} [pages|km|miles] on {day} and {b} on the next day. How many [in total|altogether|is that]?", "{a} + {b}"),
    ("A [shirt|book|lamp|chair] costs {a} {m} and a [hat|pen|cup|bag] costs {b} {m}. How much do they cost together?", "{a} + {b}"),
    ("I paid {a} {m} for [food|lunch|the hotel] and {b} {m} for [drinks|dinner|the train]. How much did I [spend|pay] [in total|altogether|in all]?", "{a} + {b}"),
    ("{n} has {a} {t}, {o} has {b}. How many do they have [together|in total|between them]?", "{a} + {b}"),
    ("If I have {a} {t} and buy {b} more, how many {t} do I have?", "{a} + {b}"),
    ("A class has {a} boys and {b} girls. How many children are [in it|there|in the class]?", "{a} + {b}"),
    ("{n} has {a} {t}, {o} has {b} and I have {c}. How many do we have together?", "{a} + {b} + {c}"),
    ("I spent {a}, {b} and {c} {m}. What is [the total|that in total|my total]?", "{a} + {b} + {c}"),
    ("It was {b} degrees and it got {a} degrees warmer. How warm is it now?", "{b} + {a}"),
    ("{n} has {a} {t} and [gives away|loses|eats|sells|breaks|uses] {b}[ of them|]. How many [are left|{t} are left|does {n} have left|remain]?", "{a} - {b}"),
    ("{n} had {a} {t} [but|and] [gave|sold] {b} to {o}. How many [are left|does {n} still have|does {n} have now]?", "{a} - {b}"),
    ("There were {a} {t}. {B} [were sold|were eaten|broke|are gone|were taken]. How many are [left|still there]?", "{a} - {b}"),
    ("A [book|report] has {a} pages. {n} has read {b}. How many pages [are left|remain|does {n} still have to read]?", "{a} - {b}"),
    ("I had {a} {m} and spent {b}[ {m}|]. How much [is left|do I have left|money is left|remains]?", "{a} - {b}"),
    ("{n} earns {a} {m} and pays {b} {m} [in rent|in tax|for food]. How much is left?", "{a} - {b}"),
    ("If I have {a} {t} and give away {b}, how many [are left|do I have left|do I keep]?", "{a} - {b}"),
    ("{n} is {a} years old and {o} is {b}. How much older is {n}?", "{a} - {b}"),
    ("{n} has {a} {t}, {o} has {b}. How many more does {n} have?", "{a} - {b}"),
    ("A bus had {a} [people|passengers] on it. At the stop {b} got off. How many are [still on it|on the bus now]?", "{a} - {b}"),
    ("We need {a} {t} and have {b}. How many [are missing|more do we need|do we still need]?", "{a} - {b}"),
    ("A tank holds {a} litres. {B} litres are used. How many litres are left?", "{a} - {b}"),
    ("It costs {a} {m} but I only have {b}. How much [more do I need|am I short]?", "{a} - {b}"),
    ("There are {a} {C}s with {b} {t} [each|in each|in every one]. How many {t} [are there|are there in total|is that|are there altogether]?", "{a} * {b}"),
    ("{n} [buys|has|packs|carries] {a} {C}s [of|with] {b} {t} [each|]. How many {t} [is that|does {n} have|are there]?", "{a} * {b}"),
    ("Each {C} holds {b} {t}. How many {t} [are in|fit in|fit into] {a} {C}s?", "{b} * {a}"),
    ("One [ticket|book|chair|cake|lamp] costs {b} {m}. How much do {a} [cost|of them cost]?", "{b} * {a}"),
    ("A [ticket|book|kilo|bottle] costs {b} {m}. What do I pay for {a}?", "{b} * {a}"),
    ("How much do {a} {t} cost [at {b} {m} each|if one costs {b} {m}|if each costs {b} {m}]?", "{a} * {b}"),
    ("{n} buys {a} {t} [at|for] {b} {m} each. How much does [he|she|{n}] pay?", "{a} * {b}"),
    ("I buy {a} {t} at {b} {m} each. [How much is that|What is the total|How much do I pay|What do they cost]?", "{a} * {b}"),
    ("{n} earns {b} {m} [an hour|per hour|a day|per day]. How much [is that|does {n} earn|is it] [in|for|after] {a} [hours|days]?", "{b} * {a}"),
    ("A [car|train|bus] drives {b} km [per hour|an hour|every hour]. How far does it get in {a} hours?", "{b} * {a}"),
    ("A machine makes {b} {t} per hour. How many does it make in {a} hours?", "{b} * {a}"),
    ("{n} [reads|writes|walks|runs] {b} [pages|km|miles] [a|per|every] day. How many [is that|] in {a} days?", "{b} * {a}"),
    ("A room is {a} metres long and {b} metres wide. What is its area?", "{a} * {b}"),
    ("What is the area of a [rectangle|garden|field|room] of {a} by {b} [metres|m|feet]?", "{a} * {b}"),
    ("What is the area of a rectangle with sides {a} and {b}?", "{a} * {b}"),
    ("What is the perimeter of a rectangle with sides {a} and {b}?", "2 * ({a} + {b})"),
    ("What is the perimeter of a square with side {a}?", "4 * {a}"), ("What is the area of a square with side {a}?", "{a} ** 2"),
    ("How many [legs do {a} spiders have if each has|wheels do {a} cars have with] {b}[ each|]?", "{a} * {b}"),
    ("I save {b} {m} [a month|every month|each month|per month]. How much do I have after {a} months?", "{b} * {a}"),
    ("{a} {t} are [shared|split|divided] [equally|evenly|] [among|between] {b} [people|children|friends]. How many does each [get|receive]?", "{a} / {b}"),
    ("{n} [shares|splits|divides] {a} {t} [equally |evenly |]among {b} [friends|children|people]. How many does each [get|one get]?", "{a} / {b}"),
    ("How many {C}s of {b} do I need for {a} {t}?", "{a} / {b}"),
    ("{n} packs {a} {t} into {C}s of {b}. How many {C}s are [needed|filled|there]?", "{a} / {b}"),
    ("A [book|novel] has {a} pages. {n} reads {b} pages [a|per|every] day. How many days does it take?", "{a} / {b}"),
    ("A car needs {b} hours for {a} km. How [fast is it|many km per hour is that]?", "{a} / {b}"),
    ("{b} {t} cost {a} {m}. [What does one cost|How much is one|What is the price of one]?", "{a} / {b}"),
    ("We are {b} people and the bill is {a} {m}. How much does each [pay|person pay|of us pay]?", "{a} / {b}"),
    ("A bill of {a} {m} is split [between|among] {b} people. How much does each [pay|person pay]?", "{a} / {b}"),
    ("{n} earns {a} {m} in {b} [days|hours|weeks]. How much [is that|] per [day|hour|week]?", "{a} / {b}"),
    ("If {b} people share {a} {t}, how many does each get?", "{a} / {b}"),
    ("A rope of {a} metres is cut into {b} equal pieces. How long is each[ piece|]?", "{a} / {b}"),
    ("{n} has {a} {C}s with {b} {t} each and {c} [more|loose ones|extra {t}]. How many {t} [is that|does {n} have|are there] [in total|altogether|]?", "{a} * {b} + {c}"),
    ("{n} buys {a} {t} at {b} {m} each and a [bag|drink|book] for {c} {m}. [What is the total|How much is that|How much does {n} pay]?", "{a} * {b} + {c}"),
    ("A taxi costs {c} {m} plus {b} {m} per km. How much is a ride of {a} km?", "{c} + {b} * {a}"),
    ("{n} has {c} {m} and saves {b} {m} [a|per|each] week. How much [is it|does {n} have] after {a} weeks?", "{c} + {b} * {a}"),
    ("{n} buys {a} {t} at {b} {m} each and {c} {s} at {d} {m} each. [What is the total|How much is that|How much does {n} pay]?", "{a} * {b} + {c} * {d}"),
    ("{n} had {a} {t}, got {b} more and lost {c}. How many are [left|there now]?", "{a} + {b} - {c}"),
    ("A bus has {a} passengers. {B} get on and {c} get off. How many are on it now?", "{a} + {b} - {c}"),
    ("{n} has {a} {t}. {o} takes {b} and {p} takes {c}. How many are left?", "{a} - {b} - {c}"),
    ("I have {z} {m} and buy {a} {t} at {b} {m} each. How much [is left|change do I get|money is left]?", "{z} - {a} * {b}"),
    ("{n} pays with {z} {m} for {a} {t} at {b} {m} each. How much change [is there|does {n} get]?", "{z} - {a} * {b}"),
    ("{n} and {o} [collect|pick|find|earn] {a} and {b} {t} and share them [equally|fairly]. How many does each get?", "({a} + {b}) / 2"),
    ("A [coat|phone|lamp] costs {a} {m} and is [reduced by {k}%|{k}% off|now {k} percent cheaper]. What is the [new|] price?", "{a} * (100 - {k}) / 100"),
    ("What is the price of a {a} {m} [coat|phone|lamp] with {k}% discount?", "{a} * (100 - {k}) / 100"),
    ("A price of {a} {m} [rises|goes up] by {k}%. What is the new price?", "{a} * (100 + {k}) / 100"),
    ("What is a {k}% tip on {a} {m}?", "{k}% of {a}"), ("How much is a {k} percent tip on a bill of {a} {m}?", "{k}% of {a}"),
    ("{k}% of {a} {t} are broken. How many is that?", "{k}% of {a}"), ("A loan of {a} {m} at {k}% interest: how much interest is that per year?", "{k}% of {a}"),
    ("I scored {a}, {b} and {c}. What is my average?", "({a} + {b} + {c}) / 3"), ("{n} got {a} and {b} points in two tests. What is the average?", "({a} + {b}) / 2"),
    ("How many minutes are [there|] in {a} hours?", "{a} * 60"), ("How many seconds are {a} minutes?", "{a} * 60"), ("How many hours are [there|] in {a} days?", "{a} * 24"), ("How many days are [there|] in {a} weeks?", "{a} * 7"), ("How many months are {a} years?", "{a} * 12"), ("How many metres are {a} km?", "{a} * 1000"), ("How many eggs are {a} dozen?", "{a} * 12"), ("How many hours are {a} minutes?", "{a} / 60"), ("How many weeks are {a} days?", "{a} / 7"), ("How many grams are {a} kilograms?", "{a} * 1000"), ("How many {t} are {a} dozen {t}?", "{a} * 12"),
    ("A film of {a} minutes starts after {b} minutes of ads. How long does it take in total?", "{a} + {b}"),
    ("A farmer has {a} cows and twice as many sheep. How many sheep are there?", "{a} * 2"), ("{n} has {a} {t}. {o} has [twice|double] as many. How many does {o} have?", "{a} * 2"), ("{n} has {a} {t}, {o} has three times as many. How many does {o} have?", "{a} * 3"), ("{n} has {a} {t}. {o} has half as many. How many does {o} have?", "{a} / 2"),
    ("{n} has {a} {t}. {o} has {b} more than {n}. How many does {o} have?", "{a} + {b}"), ("{n} has {a} {t}. {o} has {b} fewer than {n}. How many does {o} have?", "{a} - {b}"),
    ("{n} has {b} times as many {t} as {o}, who has {a}. How many does {n} have?", "{b} * {a}"),
    ("{a} [teams|groups|tables] have {b} [players|people|seats] each. How many [players|people|seats] are [there|there in total|that]?", "{a} * {b}"),
    ("A [theatre|hall|cinema] has {a} rows of {b} seats. How many seats [are there|is that|does it have]?", "{a} * {b}"),
    ("{n} picks {a} {t} in the morning and {b} in the afternoon. How many {t} is that altogether?", "{a} + {b}"), ("A shop has {a} {t} and sells {b}. How many {t} are left?", "{a} - {b}"), ("{n} owns {a} {C}s and each one has {b} {t}. How many {t} are there?", "{a} * {b}"), ("{a} {t} are packed in {C}s of {b}. How many {C}s is that?", "{a} / {b}"), ("A worker makes {b} {t} per day. How many are there after {a} days?", "{b} * {a}"), ("{n} buys {a} {t} for {b} {m} each and pays {c} {m} for the delivery. How much is that in total?", "{a} * {b} + {c}"), ("{n} has {a} {t}, {o} gives {n} {b} more and {n} loses {c}. How many are left?", "{a} + {b} - {c}"), ("Five friends share a bill of {a} {m}. How much does each pay?", "{a} / 5"), ("I have {a} {m} in cash and {b} {m} at the bank. How much do I have altogether?", "{a} + {b}"), ("A trip of {a} km needs {b} days. How many km is that per day?", "{a} / {b}"), ("How much are {a} {t} if one costs {b} {m}?", "{a} * {b}"), ("{n} had {a} {m} and paid {b} {m} for {t}. How much is left?", "{a} - {b}"),
]  # fmt: skip

# An operation on a value that a tool call has to fetch first. {v} is the value's description.
ON_VALUE = [
    ("What would {v} minus {k} be?", "{N} - {k}"), ("How much would {v} plus {k} be?", "{N} + {k}"), ("How much would {v} times {k} be?", "{N} * {k}"), ("lower {v} by {k}", "{N} - {k}"), ("raise {v} by {k}", "{N} + {k}"), ("What does {v} times {k} give?", "{N} * {k}"), ("What does {v} minus {k} give?", "{N} - {k}"), ("How much does {v} divided by {k} give?", "{N} / {k}"), ("give me {v} plus {k}", "{N} + {k}"), ("give me {v} minus {k}", "{N} - {k}"), ("give me {v} divided by {k}", "{N} / {k}"), ("What would half of {v} be?", "{N} / 2"),
    ("{any} {v} plus {k}", "{N} + {k}"), ("{any} {v} times {k}", "{N} * {k}"), ("{any} {v} minus {k}", "{N} - {k}"), ("{any} {v} divided by {k}", "{N} / {k}"), ("What {any} {v} plus {k}?", "{N} + {k}"), ("What {any} {v} times {k}?", "{N} * {k}"), ("What {any} {v} minus {k}?", "{N} - {k}"), ("{v} times {k}", "{N} * {k}"), ("{v} plus {k}", "{N} + {k}"), ("{v} minus {k}", "{N} - {k}"), ("{v} divided by {k}", "{N} / {k}"), ("{any} {v} by adding {k}", "{N} + {k}"), ("What does {v} plus {k} make?", "{N} + {k}"), ("What is {k} less than {v}?", "{N} - {k}"), ("What is {k} more than {v}?", "{N} + {k}"), ("I need {v} times {k}.", "{N} * {k}"), ("What do I get if I add {k} to {v}?", "{N} + {k}"), ("What do I get if I multiply {v} by {k}?", "{N} * {k}"), ("If I double {v}, what do I get?", "{N} * 2"), ("deduct {k} from {v}", "{N} - {k}"),
    ("multiply {v} by {k}", "{N} * {k}"), ("double {v}", "{N} * 2"), ("triple {v}", "{N} * 3"), ("halve {v}", "{N} / 2"), ("add {k} to {v}", "{N} + {k}"), ("subtract {k} from {v}", "{N} - {k}"), ("divide {v} by {k}", "{N} / {k}"), ("take {k} away from {v}", "{N} - {k}"), ("square {v}", "{N} ** 2"), ("increase {v} by {k}", "{N} + {k}"), ("[reduce|decrease] {v} by {k}", "{N} - {k}"), ("subtract {v} from {k}", "{k} - {N}"), ("multiply {k} by {v}", "{k} * {N}"), ("multiply {v} with {k}", "{N} * {k}"),
    ("[compute|calculate|work out|find|tell me] {v} [times|multiplied by] {k}", "{N} * {k}"), ("[compute|calculate|work out|find|tell me] {v} plus {k}", "{N} + {k}"), ("[compute|calculate|work out|find|tell me] {v} minus {k}", "{N} - {k}"), ("[compute|calculate|work out|find|tell me] {v} divided by {k}", "{N} / {k}"), ("[compute|calculate|work out|find|tell me] {k}% of {v}", "{k}% of {N}"), ("[compute|calculate|find|tell me] [twice|double] {v}", "{N} * 2"), ("[compute|calculate|find|tell me] half of {v}", "{N} / 2"),
    ("What is {v} times {k}?", "{N} * {k}"), ("What is {v} plus {k}?", "{N} + {k}"), ("What is {v} minus {k}?", "{N} - {k}"), ("What is {v} divided by {k}?", "{N} / {k}"), ("What is {k} times {v}?", "{k} * {N}"), ("What is {k}% of {v}?", "{k}% of {N}"), ("What is [twice|double] {v}?", "{N} * 2"), ("What is half of {v}?", "{N} / 2"), ("How much is {v} times {k}?", "{N} * {k}"), ("How much is {v} plus {k}?", "{N} + {k}"), ("What is {v} squared?", "{N} ** 2"), ("What is {k} plus {v}?", "{k} + {N}"), ("What is {k} minus {v}?", "{k} - {N}"), ("What do you get if you [multiply {v} by|double {v} and divide by] {k}?", ""), ("How much is {k} percent of {v}?", "{k}% of {N}"),
    ("What is {v} [doubled|times two]?", "{N} * 2"), ("What is the square of {v}?", "{N} ** 2"), ("How much is {v} divided by {k}?", "{N} / {k}"), ("How much is {v} minus {k}?", "{N} - {k}"),
]  # fmt: skip
ON_VALUE = [pair for pair in ON_VALUE if pair[1]]
ON_VALUE += [
    ("What would {v} plus {k} be?", "{N} + {k}"), ("What would {v} times {k} be?", "{N} * {k}"), ("take {v} and lower it by {k}", "{N} - {k}"), ("What does {v} divided by {k} give?", "{N} / {k}"), ("take {v} and raise it by {k}", "{N} + {k}"), ("give me {v} times {k}", "{N} * {k}"),
    ("add {k}% to {v}", "{N} * (100 + {k}) / 100"), ("[reduce|decrease|lower] {v} by {k}%", "{N} * (100 - {k}) / 100"), ("increase {v} by {k}%", "{N} * (100 + {k}) / 100"), ("take {k}% off {v}", "{N} * (100 - {k}) / 100"), ("subtract {k}% from {v}", "{N} * (100 - {k}) / 100"), ("take {v}, add {k}", "{N} + {k}"), ("take {v} and multiply it by {k}", "{N} * {k}"), ("take {v}[,| and] double it", "{N} * 2"), ("take {v} and divide it by {k}", "{N} / {k}"), ("take {v} and subtract {k}", "{N} - {k}"), ("What is {v} plus {k}, divided by {j}?", "({N} + {k}) / {j}"), ("multiply {v} by {k} and add {j}", "{N} * {k} + {j}"), ("add {k} to {v} and multiply [the result|] by {j}", "({N} + {k}) * {j}"), ("What is {v} times {k} plus {j}?", "{N} * {k} + {j}"), ("subtract {k} from {v} and divide by {j}", "({N} - {k}) / {j}"), ("How much do I pay if I pay {v} {k} times?", "{N} * {k}"), ("How much is {v} for {k} [months|days|weeks|people|years]?", "{N} * {k}"), ("How much is {v} [a year|per year|in a year]?", "{N} * 12"), ("How much is {v} if it [rises|goes up|grows] by {k}?", "{N} + {k}"), ("How much is left of {v} if I spend {k}?", "{N} - {k}"), ("split {v} [between|among] {k} people", "{N} / {k}"), ("[calculate|compute|find|tell me] {v} squared", "{N} ** 2"), ("[calculate|compute|find|tell me] the square root of {v}", "sqrt({N})"), ("What is the square root of {v}?", "sqrt({N})"), ("[calculate|compute|find|tell me] a third of {v}", "{N} / 3"), ("[calculate|compute|find] how much {v} times {k} is", "{N} * {k}"), ("[calculate|compute|find] what {v} plus {k} is", "{N} + {k}"),
]  # fmt: skip
# An operation on two values that have to be fetched first.
ON_TWO = [
    ("How much are {v} and {w} in total?", "{N} + {M}"), ("How much is {v} and {w}?", "{N} + {M}"), ("add {v} and {w} together", "{N} + {M}"), ("give me {v} plus {w}", "{N} + {M}"), ("give me {v} minus {w}", "{N} - {M}"), ("What do you get for {v} plus {w}?", "{N} + {M}"), ("What do you get for {v} times {w}?", "{N} * {M}"), ("give me the product of {v} and {w}", "{N} * {M}"),
    ("{any} {v} and {w} together", "{N} + {M}"), ("{any} {v} plus {w}", "{N} + {M}"), ("{any} {v} times {w}", "{N} * {M}"), ("{any} {v} minus {w}", "{N} - {M}"), ("{v} plus {w}", "{N} + {M}"), ("{v} times {w}", "{N} * {M}"), ("{v} minus {w}", "{N} - {M}"), ("subtract {w} from {v}", "{N} - {M}"), ("What is the total of {v} and {w}?", "{N} + {M}"), ("total {v} and {w}", "{N} + {M}"), ("How much more is {v} than {w}?", "{N} - {M}"), ("What is left of {v} after {w}?", "{N} - {M}"), ("What do {v} and {w} make [together|in total]?", "{N} + {M}"), ("[combine|join] {v} and {w}", "{N} + {M}"), ("What is the average of {v} and {w}?", "({N} + {M}) / 2"), ("How much is {v} times {w}?", "{N} * {M}"), ("How much is {v} minus {w}?", "{N} - {M}"), ("What do I get if I add {v} and {w}?", "{N} + {M}"),
    ("add {v} and {w}", "{N} + {M}"), ("add {v} to {w}", "{N} + {M}"), ("What is {v} plus {w}?", "{N} + {M}"), ("What is {v} minus {w}?", "{N} - {M}"), ("What is {v} times {w}?", "{N} * {M}"), ("multiply {v} by {w}", "{N} * {M}"), ("multiply {v} and {w}", "{N} * {M}"), ("What is the sum of {v} and {w}?", "{N} + {M}"), ("What is the product of {v} and {w}?", "{N} * {M}"), ("What is the difference between {v} and {w}?", "{N} - {M}"), ("How much are {v} and {w} together?", "{N} + {M}"), ("What do {v} and {w} add up to?", "{N} + {M}"),
    ("[compute|calculate|work out|find|tell me] {v} plus {w}", "{N} + {M}"), ("[compute|calculate|work out|find] {v} minus {w}", "{N} - {M}"), ("[compute|calculate|work out|find] {v} times {w}", "{N} * {M}"), ("divide {v} by {w}", "{N} / {M}"), ("What is {v} divided by {w}?", "{N} / {M}"), ("sum up {v} and {w}", "{N} + {M}"), ("How much is {v} plus {w}?", "{N} + {M}"), ("[compute|calculate|find] the sum of {v} and {w}", "{N} + {M}"), ("[compute|calculate|find] the product of {v} and {w}", "{N} * {M}"), ("[compute|calculate|find] the difference between {v} and {w}", "{N} - {M}"),
    ("How much is {v} and {w} in total?", "{N} + {M}"), ("add together {v} and {w}", "{N} + {M}"), ("give me {v} times {w}", "{N} * {M}"), ("What do you get for {v} minus {w}?", "{N} - {M}"),
]  # fmt: skip

BOTH = [
    ("give me the sum of {v}", "+"), ("What do {v} make together?", "+"), ("add together {v}", "+"), ("How much do {v} add up to?", "+"), ("tell me the product of {v}", "*"),
    ("{any} the sum of {v}", "+"), ("{any} the product of {v}", "*"), ("open {f} and {g} and add the numbers", "+"), ("take {v} and add them", "+"), ("take {v} and multiply them", "*"), ("What do {v} add up to?", "+"), ("What is the total of {v}?", "+"),
    ("add {v}", "+"), ("add up {v}", "+"), ("What is the sum of {v}?", "+"), ("multiply {v}", "*"), ("sum {v}", "+"), ("What is the product of {v}?", "*"), ("compute the sum of {v}", "+"), ("calculate the sum of {v}", "+"), ("read {f} and {g} and add the numbers", "+"), ("read {f} and {g} and multiply the numbers", "*"), ("read {f} and {g} and add them [up|together]", "+"), ("read the numbers in {f} and {g} and add them", "+"), ("tell me the sum of {v}", "+"), ("add {v} together", "+"), ("compute the product of {v}", "*"),
    ("sum together {v}", "+"), ("give me the product of {v}", "*"), ("How much do {v} make together?", "+"),
]  # fmt: skip

FILE_VALUE = [
    "the value kept in {f}", "the value inside {f}", "the value that is in {f}", "the number that is kept in {f}", "the number that is inside {f}", "the number found in {f}",
    "the {any} in {f}", "the {any} [stored|saved|written] in {f}", "the number that {f} [contains|holds]", "the price in {f}", "the total in {f}", "{f}", "the figure from {f}", "the amount [stored|saved] in {f}", "what {f} says", "the number you find in {f}", "the sum in {f}", "the result in {f}",
    "the number in {f}", "the number in {f}", "the value in {f}", "the number [stored|saved|written] in {f}", "the number from {f}", "what is in {f}", "the content of {f}", "the value [stored|saved] in {f}", "the amount in {f}", "the number in the file {f}", "the figure in {f}", "the number {f} contains", "the number that is in {f}", "the contents of {f}", "the value from {f}",
    "the number kept in {f}", "the number inside {f}", "the value of {f}",
]  # fmt: skip
THEN_IT = ["it", "the number", "that number", "the value", "the number in it", "the value in it"]

LISTS = [
    ("What do the numbers in {f} make together?", "+"), ("How much do the values in {f} add up to?", "+"), ("sum the values from {f}", "+"), ("read {f} and add its numbers", "+"), ("add together the numbers from {f}", "+"),
    ("{any} the sum of the [numbers|values] in {f}", "+"), ("{any} the product of the [numbers|values] in {f}", "*"), ("There are numbers in {f}. [Add them up|Sum them|What is their sum]?", "+"), ("What is the total of the [numbers|values|amounts] in {f}?", "+"), ("sum {f}", "+"), ("add up [all the|all|the] [values|amounts|figures|prices] in {f}", "+"), ("read {f} and tell me the [sum|total] of the numbers", "+"), ("open {f} and add up the numbers", "+"), ("take the numbers in {f} and add them", "+"), ("take the numbers in {f} and multiply them", "*"), ("How much is everything in {f} together?", "+"),
    ("[add up|sum up|sum|total] the numbers in {f}", "+"), ("[compute|calculate|find|work out|tell me] the [sum|total] of the numbers in {f}", "+"), ("What is the [sum|total] of the numbers in {f}?", "+"), ("read {f} and [add up|sum|sum up] the numbers[ in it|]", "+"), ("What do the numbers in {f} add up to?", "+"), ("add the numbers [from|in] {f} together", "+"), ("[compute|calculate|find|tell me] the product of the numbers in {f}", "*"), ("multiply the numbers in {f}", "*"), ("What is the product of the numbers in {f}?", "*"), ("add all [the|] numbers in {f}", "+"), ("What is the sum of all values in {f}?", "+"),
    ("How much do the numbers in {f} make together?", "+"), ("sum together the values from {f}", "+"), ("read {f} and multiply its numbers", "*"),
]  # fmt: skip

AVERAGES = [
    "show me the average of the numbers in {f}",
    "give me the mean of the values in {f}",
    "read {f} and average the numbers",
    "work out the average of the values in {f}",
    "[compute|calculate|find|tell me] the [average|mean] of the numbers in {f}",
    "What is the [average|mean] of the [numbers|values] in {f}?",
    "average the numbers in {f}",
    "give me the average of the numbers in {f}",
]

# Orders to keep a result; {f} is a file, {l} a label.
SAVE = [
    "place it in {f}", "place the answer in {f}", "keep the result in {f}", "keep it in the file {f}", "record the answer in {f}", "record it in {f}", "keep the answer in {f}", "place the number in the file {f}",
    "{any} the result [in|into|to] {f}", "{any} it [in|into|to] {f}", "{any} the answer [in|into|to] the file {f}", "[save|write|store] your [result|answer] [to|in] {f}", "[export|log|note] the [result|answer] [to|in] {f}", "the [result|answer] [should go|goes] [to|into] {f}", "[save|store] what you get in {f}", "[create|make] a file [called|named] {f} with the [result|answer]", "write the [outcome|sum|value|solution] to {f}",
    "[write|save|store|put] [the result|the answer|it|the number|that] [to|in|into] {f}", "[write|save|store|put] the result [to|in|into] {f}", "[write|save] it [to|in] {f}", "save the [result|answer] as {f}", "[write|save|store|put] the [result|answer|total|number] [to|in|into] the file {f}", "create {f} with the [result|answer]", "make a file {f} with the [result|answer]", "write what you get to {f}", "put what you get into {f}", "save it in a file [called|named] {f}", "write the [result|answer] [down in|into] {f}", "write the [result|answer] into a file [called|named|] {f}", "store what comes out in {f}", "write that [to|into] {f}",
    "place the result in {f}", "keep the answer in the file {f}", "record the result in {f}",
]  # fmt: skip
KEEP = [
    ("note what comes out", "the result is {R}"), ("remember what you get", "the result is {R}"), ("keep a note of it", "the result is {R}"), ("keep a note of the answer", "the result is {R}"), ("memorize it", "the result is {R}"), ("memorize the result as {l}", "{l} is {R}"), ("keep a note of it as {l}", "{l} is {R}"), ("memorise that as {l}", "{l} is {R}"),
    ("{any} the result", "the result is {R}"), ("{any} the answer", "the result is {R}"), ("{any} it as {l}", "{l} is {R}"), ("remember that {l} is [that|that number|the result]", "{l} is {R}"), ("save it [in your notes|in memory] as {l}", "{l} is {R}"), ("store it as {l}", "{l} is {R}"), ("keep that as {l}", "{l} is {R}"), ("remember the [result|answer|number|sum|total]", "the result is {R}"), ("make a note of it", "the result is {R}"), ("note it", "the result is {R}"), ("keep it in mind", "the result is {R}"), ("note that {l} is [that|the result]", "{l} is {R}"), ("call it {l} and remember it", "{l} is {R}"), ("learn the result", "the result is {R}"), ("remember that", "the result is {R}"), ("note it down as {l}", "{l} is {R}"), ("remember this as {l}", "{l} is {R}"), ("remember this number", "the result is {R}"),
    ("remember the [result|answer] as {l}", "{l} is {R}"), ("remember it as {l}", "{l} is {R}"), ("remember that as {l}", "{l} is {R}"), ("remember the [result|answer]", "the result is {R}"), ("remember it", "the result is {R}"), ("note the [result|answer] as {l}", "{l} is {R}"), ("keep the [result|answer] in mind", "the result is {R}"), ("make a note of the [result|answer]", "the result is {R}"), ("note it as {l}", "{l} is {R}"), ("don't forget the [result|answer]", "the result is {R}"), ("remember that {l} is the result", "{l} is {R}"), ("note down the [result|answer]", "the result is {R}"), ("memorize the [result|answer]", "the result is {R}"), ("store the result in your [notes|memory]", "the result is {R}"), ("remember that number", "the result is {R}"), ("note that as {l}", "{l} is {R}"), ("keep it in your notes as {l}", "{l} is {R}"),
    ("remember what comes out", "the result is {R}"), ("keep a note of the result", "the result is {R}"), ("memorize it as {l}", "{l} is {R}"),
]  # fmt: skip
JOIN = [
    ", afterwards ",
    ". When you are done, ",
    ". Afterwards ",
    ". When that is done, ",
    " and finally ",
    ". Finally, ",
    ", after that ",
    ". And ",
    ", please ",
    " and also ",
    ". Please ",
    " & ",
    " and {any} ",
    ". {any}, ",
    " and ",
    " and then ",
    ", then ",
    ", and ",
    ". Then ",
    "; then ",
    ". After that ",
    " and after that ",
    ". Also ",
    ". Next ",
    ", and then ",
    ", and afterwards ",
    ". When done, ",
]

COPY = [
    "reproduce {f} as {g}", "The text in {f} should be in {g} as well.", "read {f} and write the same to {g}", "{g} should also hold the text of {f}.", "read {f} and then write it to {g}",
    "{any} {f} [to|into|as] {g}", "{any} the [text|contents|content] of {f} [to|into|in] {g}", "clone {f} [to|as|into] {g}", "transfer the [text|contents] of {f} to {g}", "save a copy of {f} [as|in|to] {g}", "make {g} a copy of {f}", "{g} should be a copy of {f}.", "{g} should [say|contain] the same as {f}.", "open {f} and copy [it|the text|what it says] [to|into] {g}", "I want the contents of {f} in {g}.", "store the [text|contents] of {f} in {g}", "take what is in {f} and [save|put|write] it [to|in|into] {g}", "create a copy of {f} [named|called] {g}",
    "copy {f} to {g}", "copy the [contents|content|text] of {f} [to|into] {g}", "read {f} and write [it|the text|its contents|the content] [to|into] {g}", "make a copy of {f} [called|named|as] {g}", "duplicate {f} as {g}", "copy the file {f} to {g}", "read {f} and save it [as|to|in] {g}", "write the [contents|content|text] of {f} [to|into] {g}", "save the [contents|content] of {f} [to|in|as] {g}", "put the [contents|text] of {f} into {g}", "I need a copy of {f} in {g}.", "back up {f} to {g}", "read what is in {f} and put it into {g}", "take the text from {f} and write it to {g}", "create {g} with the [contents|content|text] of {f}",
    "reproduce {f} in {g}", "The text of {f} should also be in {g}.", "read {f}, then write the same text to {g}",
]  # fmt: skip
READ_KEEP = [
    "learn the text of {f}", "learn what is in {f}", "open {f} and remember what it says", "keep in mind what {f} says", "keep in your notes what is in {f}", "read {f} and remember the text",
    "{any} {f} and remember it", "{any} what {f} says and remember it", "read {f} and make a note of it", "read {f} and keep [it|the text] in mind", "open {f} and remember [it|what is there]", "read {f} and don't forget it", "read {f}. Remember what it says.", "look at {f} and remember the contents", "store the text of {f} in your memory", "note down the contents of {f}", "remember the text in {f}",
    "read {f} and remember [it|what it says|the contents|the text|what is in it]", "remember what {f} says", "remember the [contents|content|text] of {f}", "remember what is in {f}", "look into {f} and remember what it says", "open {f} and make a note of what it says", "make a note of what is in {f}", "memorize the [contents|content|text] of {f}", "note what {f} says", "read {f}, then note what it says", "take what is in {f} and remember it", "keep the content of {f} in mind",
    "learn what {f} says", "open {f} and remember the text", "keep in your notes what {f} says",
]  # fmt: skip
RECALL_SAVE = [
    "bring the note about {q} to {f}", "look in your notes for {q} and save it in {f}", "look in your notes for {q} and put it in the file {f}", "find the note about {q} and put it into the file {f}",
    "{any} {q} and write it to {f}", "{any} what you know about {q} to {f}", "What do you know about {q}? Write it to {f}.", "[export|transfer] the note about {q} to {f}", "copy the note about {q} into {f}", "take the note about {q} and [save|write] it [to|in] {f}", "put the note about {q} into {f}",
    "[write|save|put] what you [know|remember] about {q} [to|into|in] {f}", "look up {q} and [write|save|put] it [to|into|in] {f}", "recall {q} and [write|save|store] it [to|in|into] {f}", "write {q} from your notes [to|into] {f}", "find {q} in your notes and [write|save] it [to|in] {f}", "[write|save|put] what I told you about {q} [to|into|in] {f}", "remember {q}? Write it to {f}.", "save the note about {q} in {f}", "check your notes for {q} and write it [to|into] {f}", "search your notes for {q} and save [it|what you find] in {f}", "[write|save] the note on {q} [to|in] {f}",
    "bring the note about {q} into the file {f}", "look in your notes for {q} and then put it into {f}",
]  # fmt: skip
TWO_READS = [
    "let me see {f} and {g}", "show me {f} and also {g}", "What is in the files {f} and {g}?", "What is written in {f} and in {g}?", "let me see both {f} and {g}",
    "{any} {f} and {g}", "{any} me {f} and {g}", "What is written in {f} and {g}?", "first read {f}, then {g}", "show me what {f} and {g} say", "read me {f} and {g}", "What do the files {f} and {g} say?", "display {f} and {g}", "tell me the contents of {f} and {g}", "What's in {f} and what's in {g}?", "What does {f} say and what does {g} say?", "read {f} and also {g}",
    "read {f} and {g}", "What do {f} and {g} say?", "show me {f} and {g}", "What is in {f} and in {g}?", "tell me what is in {f} and {g}", "read {f}, then {g}", "read both {f} and {g}", "What are the contents of {f} and {g}?", "open {f} and {g} and tell me what they say", "read the files {f} and {g}", "print {f} and [then|] {g}",
    "let me see {f} and also {g}", "What is written in the files {f} and {g}?",
]  # fmt: skip
TWO_RECALLS = [
    "tell me both {q} and {p}", "Do you have {q} and {p}?", "Do your notes say something about {q} and {p}?", "give me {q} and also {p}",
    "{any} me {q} and {p}", "What do your notes say about {q} and {p}?", "tell me about {q} and about {p}", "give me {q} and {p}", "I forgot {q} and {p}.", "find {q} and {p} in your notes", "look for {q} and {p}", "What was {q} and {p}?", "say what {q} is and what {p} is", "Both {q} and {p}, please.",
    "What is {q} and what is {p}?", "tell me {q} and {p}", "What are {q} and {p}?", "recall {q} and {p}", "I need {q} and {p}.", "look up {q} and {p}", "What do you know about {q} and about {p}?", "Do you remember {q} and {p}?", "remind me of {q} and {p}", "What did I tell you about {q} and {p}?",
    "give me both {q} and {p}", "Do your notes have {q} and {p}?",
]  # fmt: skip
TWO_CALCS = [
    "How much is {e} and what is {g}?", "compute both {e} and {g}", "find {e} and {g}", "What's {e} and what's {g}?", "tell me {e} and {g}", "give me both {e} and {g}",
    "What is {e} and what is {g}?", "compute {e} and {g}", "calculate {e} and then {g}", "What are {e} and {g}?", "[work out|compute|calculate|tell me] {e} and also {g}", "What is {e}? And {g}?", "How much is {e}, and how much is {g}?", "first [compute|calculate] {e}, then {g}",
    "What's {e} and how much is {g}?", "find both {e} and {g}",
]  # fmt: skip
WRITE_READ = [
    "{wr}{j}read out {f}", "{wr}{j}show me it", "{wr}{j}tell me what it says", "{wr}{j}show me {f}", "{wr}{j}read out what it says", "{wr}{j}show me what is in it",
    "{wr}{j}read it back", "{wr}{j}read it", "{wr}{j}show me the file", "{wr}{j}tell me what the file says", "{wr}{j}read the file", "{wr}{j}check what it says", "{wr}{j}read {f}", "{wr}{j}print it", "{wr}{j}check the file", "{wr}{j}read the file back to me",
    "{wr}{j}read out the file", "{wr}{j}show me what it says",
]  # fmt: skip

GREETINGS = [
    "hi hi", "hello hello", "Hello once more", "good morning everyone", "hi again", "hey you",
    "hi", "hello", "hey", "Hello!", "Hi there", "Good morning", "good evening", "Hey nano", "Hello there!", "Hi!", "greetings", "Good afternoon!", "Hi nano, good to see you", "hello nano", "howdy", "yo", "Good day", "hello, anyone there?", "Hey there!", "Hi, nice to meet you",
    "Hello again!", "hey hey", "Good morning, nano!", "hiya",
]  # fmt: skip
SMALL_TALK = {
    "Hello! How can I help you?": GREETINGS,
    "I am fine, thank you. How can I help you?": ["How are you?", "how do you feel today?", "are you feeling well?", "Hi nano, how are you?", "how are you doing", "How's it going?", "Are you ok?", "How do you do?", "how are you today?", "Hi, how are you?", "hey how is it going", "Hello, how are you doing?", "How are things?", "Are you well?", "What's up?", "how do you feel", "How are you feeling today?", "Hello nano, how are you?"],
    "You are welcome.": ["thanks", "Thank you!", "that helped, thanks", "I thank you", "thanks nano", "great work", "thank you, well done", "thank you very much", "Thanks a lot", "thx", "Great, thanks", "Thanks for your help", "many thanks", "perfect, thank you", "ok thanks", "cheers", "Good job!", "well done", "That was helpful", "Thank you so much for the help", "nice work", "Thanks, nano!", "thank you, that helped", "great job"],
    "Goodbye!": ["bye", "Goodbye", "good night everyone", "bye nano", "Bye, see you", "see you next week", "bye for today", "see you", "See you later", "good night", "bye bye", "That's all, bye", "Farewell", "See you tomorrow!", "ok bye", "have a nice day", "good bye nano", "Bye for now", "see you soon", "Good night, nano"],
    "I am nano, a small agent. I can calculate, remember and recall facts, and read and write files.": ["Who are you?", "What is your name?", "tell me who you are", "say your name", "May I know your name?", "what is it you do?", "What skills do you have?", "how can you help", "what is it that you do?", "could you help me?", "what are you", "Are you a robot?", "Tell me about yourself", "introduce yourself", "What's your name?", "who am I talking to?", "Are you human?", "Are you an AI?", "What kind of model are you?", "do you have a name", "Who made you?", "What can you do?", "what can you do for me", "How can you help me?", "help", "What are you able to do?", "list your skills", "What tools do you have?", "what do you do?", "Can you help me?", "I need help", "What are your abilities?", "Tell me what you can do", "What can I ask you?", "which tools can you use", "how do I use you?", "What are you good at?", "Which things can you do?", "What else can you do?", "which tasks can you handle?", "Say who you are", "May I ask your name?", "what is it that you can do?", "What are your skills?", "how could you help me"],
}  # fmt: skip
CANNOT = [
    "write a {any} about {w}", "mail {n}", "mail a {w} to {n}", "send a letter to {n}", "search for {w} on the web", "search the web for {n}", "dim the {w}", "buy a ticket for {n}", "buy a {w}", "buy a {w} to {c}", "tell me a funny story", "tell me a joke about {w}", "tell me something funny", "play a song", "play a song about {w}", "play something by {n}", "ring up {n}", "look for {n} online", "turn down the lights",
    "{any} a {w}", "{any} the {w}", "{any} {n}", "{any} my {w}", "{any} a {w} for {n}", "{any} to {c}", "{any} {w} {any2}", "{any} a {w} about {any2}", "{any} {any2} on the {w}", "play a game", "play the radio", "tell me a fairy tale", "write me a letter to {n} about {w}", "compose a song", "write a speech", "check my [mail|email|messages]", "order [a|some] {w}", "find a {w} shop", "look up {w} on the internet", "show me the way to {c}", "ring {n}", "email {n} that I am ill", "turn off the {w}", "switch on the {w}", "book me a {w}", "buy me a {w}", "wash my {w}", "bring me a {w}", "translate {w} to German", "explain {w} to me", "describe a {w}", "summarise the book", "start the {w}", "reboot", "format the disk", "take me to {c}", "delete everything", "delete the folder", "compress {f}", "upload {f}", "move to {c}", "give me a {w} tip", "draw a picture of {n}", "make a phone call", "water the {w}", "feed the {w}", "lock the {w}", "paint my {w} red", "sing for {n}", "write a novel", "tweet {w}", "connect to the {w}", "watch the {w}",
    "send an email to {n}", "book a flight to {c}", "play some music", "translate {w} into French", "write a poem about {w}", "tell me a joke", "call {n}", "order a pizza", "turn on the lights", "set an alarm for {t}", "draw a {w}", "sing a song", "book a table for {day}", "open the browser", "search the internet for {w}", "google {w}", "delete {f}", "remove the file {f}", "buy {w} online", "send a message to {n}", "text {n} that I am late", "set a timer for {d} minutes", "make me a coffee", "restart the computer", "install {w}", "write an essay about {w}", "summarise the news", "download {w}", "translate this: {x}", "post a tweet about {w}", "take a picture", "clean my room", "drive me to {c}", "print a photo of my {w}", "give me directions to {c}", "run the program {w}", "invite {n} to dinner", "rename {f} to {g}", "wake me up at {t}", "tell me a story about a {w}", "transfer {d} {m} to {n}", "write code for a {w}", "write a song about {n}", "paint a {w}", "hack the {w}", "call a taxi", "schedule a meeting with {n}", "show me a video of a {w}", "cook dinner", "close the window", "recommend a good {w}", "write a story about {n}", "erase {f}", "stream a film", "fix my {w}", "teach me French", "reserve a room in {c}", "send {f} to {n}", "pay the bill", "browse the web for {w}", "record a video", "convert {f} to pdf", "plan my trip to {c}",
    "phone {n}", "write a limerick about {w}", "mail a letter to {n}", "look for {w} on the web", "dim the lights", "buy a ticket to {c}", "tell me a funny joke about a {w}", "play a song by {n}",
]  # fmt: skip
CANNOT_ANSWER = "I cannot do that. I can calculate, remember and recall facts, and read and write files."
UNKNOWN = [
    "What is the capital of {c}?", "Who is {n}?", "What is the weather in {c}?", "When is {n}'s birthday?", "Where is my {w}?", "Who wrote {W}?", "What is my {w}?", "How old is {n}?", "What does {n} like?", "Where does {n} live?", "What is the name of my {w}?", "Who invented the {w}?", "When does the {w} close?", "What's the {w} of {n}?", "Why is the {w} {v}?", "Where did I leave my {w}?", "What is a {w}?",
    "Who discovered the {w}?", "Where can I find my {w}?", "What is {n}'s favourite {w}?", "When did {n} leave?",
]  # fmt: skip

POLITE = [
    "{any} {any2}, {o}.", "It would be {any} if you {any2} {o}.", "Be {any} and {o}.", "{any}, {o}", "I {any} you to {o}.", "{any} me, can you {o}?", "Would it be [possible|ok] to {o}?", "Is it possible to {o}?", "I was wondering if you could {o}.", "If possible, {o}.", "Do me a favour and {o}.", "Can I ask you to {o}?", "It would be nice if you [would|could] {o}.", "You can {o}.", "Time to {o}.", "Your job is to {o}.", "I wish you would {o}.", "Let me ask you to {o}.", "{o}, would you?", "{o} now", "{o} quickly, please.", "{o}, ok?", "{o}. Thank you.", "Hey nano, {o}, please!", "Dear assistant, {o}.", "Good morning! {o}.", "I need your help. Please {o}.", "So {o}.", "First of all, {o}.", "Could you kindly {o}?", "I'd appreciate it if you could {o}.", "As a next step, {o}.", "Will you please {o}?", "Please try to {o}.", "I have to ask you to {o}.", "Then {o}.", "And now {o}.", "The task is to {o}.", "Would you be able to {o}?", "Are you able to {o}?",
    "{o}", "{o}", "{o}", "{o}", "{o}.", "{o}.", "{o}.", "{o}!", "Please {o}.", "please {o}", "{o} please", "{o}, please.", "Can you {o}?", "Could you {o}?", "Could you please {o}?", "Can you please {o}?", "Would you {o}?", "Will you {o}?", "I want you to {o}.", "I need you to {o}.", "I would like you to {o}.", "I'd like you to {o}", "Hey, {o}.", "Hi! {o}.", "Hello, can you {o}?", "Now {o}.", "Ok, {o}.", "{o}, thanks.", "{o}. Thanks!", "{o} for me", "{o} for me, please.", "Hi nano, please {o}", "nano, {o}", "Would you mind: {o}", "Your task: {o}.", "Task: {o}", "Next, {o}.", "Just {o}.", "Quickly {o}.", "I need your help: {o}.", "Go ahead and {o}.", "Would you please {o}?", "Let's {o}.", "Help me {o}.", "You should {o}.", "Kindly {o}.",
    "Would you be so kind and {o}?", "Be so good and {o}.", "It would be great if you could {o}.", "{o}, thank you very much.", "Dear nano, {o}.", "May I ask you to {o}?",
]  # fmt: skip
LEAD = [
    "{any}, ",
    "{any} {any2}. ",
    "{any}: ",
    "Could you help me? ",
    "Listen, ",
    "Good morning. ",
    "Good evening! ",
    "Please, ",
    "I need help. ",
    "Dear nano, ",
    "Sorry, ",
    "Now, ",
    "Next: ",
    "And ",
    "Just wondering: ",
    "Hmm, ",
    "I forgot: ",
    "Say, ",
    "First, ",
    "By the way, ",
    "Thanks. ",
    "Great. ",
    "Hey! ",
    "Hi. ",
    "Hello, ",
    "Please tell me: ",
    "Question: ",
    "nano, ",
    "Ok. ",
    "Tell me, ",
    "Quick question: ",
    "I have a question. ",
    "So, ",
    "Well, ",
    "Hi nano! ",
    "Excuse me, ",
    "One more thing: ",
]
