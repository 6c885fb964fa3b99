"""Pages that configure Tailwind's script in many places and spellings, and pages that only seem to.

Each page has a square of 64 px in a configured colour, #f00.
"""

CDN = '<script src="https://cdn.tailwindcss.com"></script>'
LITERAL = "{theme: {extend: {colors: {brand: '#f00'}}}}"
SET = f"tailwind.config = {LITERAL}"
SQUARE = '<div class="bg-brand h-16 w-16"></div>'


def page(head, body=SQUARE):
    return f'<html><head>{head}</head><body style="margin:0">{body}</body></html>'


def script(text, attributes=""):
    return f"<script{attributes}>{text}</script>"


def theme(colors):
    return f"tailwind.config = {{theme: {{extend: {{colors: {colors}}}}}}}"


ATTRIBUTES = (" type='text/javascript'", " type=module", ' type="application/javascript"',
              ' type=""', " defer async data-a='b>c'", ' language="javascript"', " nonce=abc",
              " TYPE=text/ecmascript")
SCRIPTS = {
    "plain": SET, "a comment first": f"\n// our colours\n{SET}",
    "comments around": f"/* a\n b */ {SET} /* c */ // d",
    "an HTML comment": f"<!--\n{SET}\n//-->",
    "an HTML comment closed": f"<!-- old browsers\n{SET};\n-->",
    "CDATA": f"//<![CDATA[\n{SET}\n//]]>", "CDATA in comments": f"/*<![CDATA[*/{SET}/*]]>*/",
    "lines as on Windows": f"\r\n// a\r\n{SET};\r\n", "strict": f"'use strict';{SET};;",
    "window": f"window.{SET}", "self": f"self.{SET}",
    "globalThis": f"globalThis . tailwind\n.config={LITERAL}",
    "brackets": f"window['tailwind'][\"config\"] = {LITERAL}",
    "the whole object": f"tailwind = {{config: {LITERAL}}}",
    "window and the whole object": f"window.tailwind = {{config: {LITERAL}}};",
    "var": f"var tailwind = {{config: {LITERAL}}}",
    "a constant": f"const config = {LITERAL};\ntailwind.config = config;",
    "variables": f"var red = '#f00', brand = red\nlet colors = {{brand}};{theme('colors')}",
    "global variables": f"brand = '#f00'\nwindow.palette = {{brand}}\n{theme('window.palette')}",
    "taken apart":
        f"const {{colors: c}} = tailwind; {theme('{...c, brand: c.zinc ? 1 : 2, brand: `#f00`}')}",
    "a part of it": "tailwind.config.theme = {extend: {colors: {brand: '#f00'}}}",
    "Object.assign": f"Object.assign(tailwind.config, {LITERAL})",
    "JSON": '''
        tailwind.config = {"theme": {"extend": {"colors": {"brand": "#f00"}}}}''',
    "computed": theme("{['bra\\u006ed']: '#' + 'f00'}"),
    "text with a tag": theme("{a: '<\\/script>', brand: '#f00'}"),
    "called at once": f"(function () {{ {SET} }})();",
    "an arrow called at once": f"(() => {{ {SET} }})()",
    "when the page is there":
        f"document.addEventListener('DOMContentLoaded', function () {{ {SET} }})",
    "when all is loaded": f"window.onload = () => {{ {SET} }}",
    "a listener with options":
        f"window.addEventListener('load', (e) => {{ {SET} }}, {{once: true}})",
    "if there": f"if (window.tailwind) {{ {SET} }} else {{ alert(1) }}",
    "if defined": f"if (typeof tailwind !== 'undefined') {SET}",
    "and": f"window.tailwind && (tailwind.config={LITERAL})",
    "or": f"window.tailwind = window.tailwind || {{}}; window.tailwind.config = {LITERAL}",
    "tried": f"try {{ {SET} }} catch (e) {{ console.log(e) }}",
    "without semicolons": f"let a = 1\n{SET}\nlet b = 2",
    "a menu after it":
        f"{SET}\n\nfunction toggle() {{ menu.hidden = true }}\nmenu.onclick = toggle",
    "a menu before it":
        f"const menu = document.body\nmenu?.addEventListener('click', () => {{ go() }})\n{SET}",
    "functions":
        "tailwind.config = {plugins: [function ({addUtilities}) { addUtilities({'.x': {color: "
        "'red'}}) }, tailwind.plugin(() => {})], theme: {extend: {width: ({theme}) => ({x: "
        "theme('spacing.1')}), colors: {brand: '#f00'}}}}",
    # a browser does not show these either
    "never called": f"function f() {{ {SET} }}\nconst g = () =>\n{SET}",
    "a condition": f"if (localStorage.dark) {{{SET}}}",
    "no require in a browser": f"tailwind.config = {{plugins: [require('x')], ...{LITERAL}}}",
    "an unknown name": theme("{brand: '#f00', ...palette}"),
    "another variable": f"let tailwind = {{config: {LITERAL}}}",
    "not a script": SET,
}
SPELLINGS = {
    **{name: page(CDN + script(text, " type=text/plain" if name == "not a script" else ""))
       for name, text in SCRIPTS.items()},
    **{f"script{a}": page(CDN + script(SET, a)) for a in ATTRIBUTES},
    "in the body": page(CDN, SQUARE + script(SET)), "at the end": page(CDN) + script(SET),
    "all in the body": page("", SQUARE + CDN + script(SET)),
    "a module before": page(script(SET, " type=module") + CDN),
    "before": page(script(SET) + CDN),
    "object before": page(script(f"tailwind = {{config: {LITERAL}}}") + CDN),
    "Tailwind deferred": page(CDN.replace("src", "defer src") + script(SET)),
    "all deferred": page(CDN.replace("src", "defer src") + script(f"onload = () => {{ {SET} }}")),
    "two scripts": page(CDN + script("const red = '#f00'") + script(theme("{brand: red}"))),
    "overwritten": page(CDN + script(SET) + script("tailwind.config = {darkMode: 'class'}")),
    "overwrites": page(CDN + script("tailwind.config = {darkMode: 'class'}") + script(SET)),
    "attribute": page(CDN.replace("src", f'onload="{SET}" src')),
    "attribute of the body":
        page(CDN).replace("<body", f"<body onload='{SET.replace(chr(39), '&#39;')}'"),
    "capitals": page(CDN + script(SET).replace("script", "SCRIPT")),
    "commented out": page(f"{CDN}<!--{script(SET)}-->"),
    "version and plugins": page(CDN.replace(".com", ".com/3.4.1?plugins=forms") + script(SET)),
    "the package": page(
        CDN.replace("cdn.tailwindcss.com", "unpkg.com/tailwindcss-cdn@3/tailwindcss.js")
        + script(SET)),
    "a style of version 4": page(
        '<script src="https://cdn.jsdelivr.net/npm/@tailwindcss/browser@4"></script>'
        '<style type="text/tailwindcss">@theme { --color-brand: #f00 }</style>'),
    "a style of version 3": page(
        f'{CDN}<style type="text/tailwindcss">.bg-brand {{ @apply bg-[#f00] }}</style>'),
}

EVIL = 'document.documentElement.style.background="#010203"'
HOSTILE = {name: CDN + script(text) for name, text in {
    "after it": f"{SET}; {EVIL}", "on a line of its own": f"{SET}\n{EVIL}",
    "in a comma": f"{SET}, {EVIL}",
    "a value": theme(f"{{brand: '#f00', a: {EVIL}}}"),
    "in brackets": theme(f"{{brand: ({EVIL}, '#f00')}}"),
    "a call": f"tailwind.config = (() => {{ {EVIL}; return {LITERAL} }})()",
    "a key": theme(f"{{[{EVIL}]: 1}}"),
    "a getter": f"tailwind.config = {{get theme() {{ {EVIL} }}}}",
    "a template": theme(f"{{brand: `${{{EVIL}}}`}}"),
    "spread": theme(f"{{...({EVIL}, {{}}), brand: '#f00'}}"),
    "a theme function": theme(f"() => {{ {EVIL} }}"),
    "a plugin": f"tailwind.config = {{plugins: [function () {{ {EVIL} }}]}}",
    "what a plugin is": f"tailwind.plugin.constructor('{EVIL}')()",
    "the argument of a call": f"tailwind.config = {{}}\n({EVIL})",
    "a tag": f"{EVIL}; tailwind.config`a`",
    "a line within a comment": f"// a\u2028{EVIL}\n{SET}",
    "a line within an HTML comment": f"<!-- a\u2029{EVIL}\n{SET}",
    "a pattern or a division": f"let a = 1 / 2, b = '/'; {EVIL}; a / 2\n{SET}",
    "an arrow that looks like a comment": f"let a = 1; a --> ({EVIL})\n{SET}",
    "text for code": f"var a = {{valueOf() {{ {EVIL} }}}}; {theme('{brand: 1 + a}')}",
    "a default": f"const {{nothing = {EVIL}}} = tailwind; {SET}",
    "if": f"if (window.tailwind) {EVIL}",
    "at once": f"(function (a) {{ {SET} }})({EVIL})", "else": f"if (!tailwind) {SET}; else {EVIL}",
    "an address": f"var location = 'javascript:{EVIL};void 0'",
    "an address set": f"location = 'javascript:{EVIL};void 0'",
    "a handler": f"window.onload = function () {{ {EVIL} }}",
}.items()}
HOSTILE["an attribute"] = CDN.replace(
    "src", f"onload='{SET.replace(chr(39), chr(34))}; {EVIL}' src")
HOSTILE["another attribute"] = f"{CDN}<img src=http://a.example/b onerror='{EVIL}'>"
HOSTILE["a script of data"] = (
    f"{CDN}<script src='data:text/javascript,{EVIL.replace('#', '%23')}'></script>")
