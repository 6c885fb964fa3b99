"""What the scripted reviewer sees of a page: a script that measures it in the browser. No HTML leaves it."""

LAYOUT = r"""() => {
    const W = document.documentElement.clientWidth || innerWidth;
    const H = Math.max(document.documentElement.scrollHeight, document.body ? document.body.scrollHeight : 0, 1);
    const some = (list, n) => [...list].slice(0, n);  // a page may have a million elements
    const box = e => {
        const r = e.getBoundingClientRect();
        return {x: r.x + scrollX, y: r.y + scrollY, w: r.width, h: r.height};
    };
    const style = e => getComputedStyle(e);
    const visible = e => {
        const s = style(e), b = box(e);
        return s.visibility == "visible" && +s.opacity > 0.05 && b.w >= 4 && b.h >= 4;
    };
    const rgb = text => {
        const m = (text || "").match(/rgba?\(([^)]+)\)/);
        if (!m) return null;
        const [r, g, b, a = 1] = m[1].split(/[\s,/]+/).map(Number);
        return a < 0.5 ? null : [r, g, b];
    };
    const background = e => {
        const s = style(e);
        if (s.backgroundImage.includes("gradient")) {
            const found = s.backgroundImage.match(/rgba?\([^)]+\)/g);
            return found ? rgb(found[0]) : rgb(s.backgroundColor);
        }
        return rgb(s.backgroundColor);
    };
    const words = text => text.replace(/\s+/g, " ").trim();
    const all = some(document.body ? document.body.querySelectorAll("*") : [], 3000).filter(visible);

    let page = (document.body && background(document.body)) || background(document.documentElement) || [255, 255, 255];
    for (const e of all.slice(0, 60)) {
        const b = box(e);
        if (b.w >= 0.95 * W && b.h >= 0.85 * H && background(e)) page = background(e);
    }
    const behind = e => {
        for (let p = e; p && p.nodeType == 1; p = p.parentElement) if (background(p)) return background(p);
        return page;
    };

    // every piece of text with its own box
    const texts = [];
    const walker = document.createTreeWalker(document.body || document.documentElement, NodeFilter.SHOW_TEXT);
    for (let node; texts.length < 1500 && (node = walker.nextNode());) {
        const e = node.parentElement, text = words(node.data);
        if (!text || !e || /^(SCRIPT|STYLE|NOSCRIPT|TITLE|OPTION|TEXTAREA)$/i.test(e.tagName) || !visible(e)) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const r = range.getBoundingClientRect(), s = style(e);
        if (r.width < 1 || r.height < 1) continue;
        texts.push({text: text.slice(0, 80), long: text.length, size: parseFloat(s.fontSize), color: rgb(s.color),
                    x: r.x + scrollX, y: r.y + scrollY, w: r.width, h: r.height, align: s.textAlign,
                    family: s.fontFamily});
    }
    const isSide = e => {
        const b = box(e);
        return b.w < 0.4 * W && b.h > 0.5 * H && (b.x < 0.05 * W || b.x + b.w > 0.95 * W);
    };
    const sides = all.filter(e => /^(NAV|ASIDE)$/i.test(e.tagName) && isSide(e)).map(box);
    const place = t => {  // between the sidebars that stand beside it
        const beside = sides.filter(b => t.y >= b.y && t.y < b.y + b.h && (t.x + t.w <= b.x || t.x >= b.x + b.w));
        const left = Math.max(0, ...beside.filter(b => b.x < W / 2).map(b => b.x + b.w));
        const right = Math.min(W, ...beside.filter(b => b.x > W / 2).map(b => b.x));
        const middle = t.x + t.w / 2 - (left + right) / 2;
        if (t.w > 0.7 * (right - left))
            return /center/.test(t.align) ? "centre" : /right|end/.test(t.align) ? "right" : "left";
        return Math.abs(middle) < 0.05 * W ? "centre" : middle < 0 ? "left" : "right";
    };
    const headline = texts.reduce((a, t) => !a || t.size > a.size + 0.5 ? t : a, null);
    const plain = texts.filter(t => t.size < 20).reduce((a, t) => !a || t.long > a.long ? t : a, null);

    // horizontal bands: the page's top-level blocks; one that holds most of the page is opened, but no row of columns
    const open = (e, depth) => {
        const children = some(e.children, 200).filter(c => visible(c) && !/^(SCRIPT|STYLE|LINK)$/i.test(c.tagName));
        const stacked = children.every((c, i) =>
            !i || box(c).y >= box(children[i - 1]).y + 0.5 * box(children[i - 1]).h);
        const whole = /^(SECTION|HEADER|FOOTER|ARTICLE|FORM|NAV|UL|TABLE)$/i.test(e.tagName);
        const opened = e == document.body ||
            (!whole && box(e).h > 0.6 * H && !isSide(e) && (stacked || children.some(isSide)));
        if (depth < 6 && children.length && opened && !(children.length == 1 && !children[0].children.length))
            return children.flatMap(c => open(c, depth + 1));
        return [e];
    };
    const isNav = e => /^NAV$/i.test(e.tagName) || (e.querySelectorAll("a").length >= 3 && box(e).h < 160);
    const columns = e => {
        let most = 1;
        for (const group of [e, ...some(e.querySelectorAll("*"), 400)]) {
            const rows = {};
            for (const c of some(group.children, 60)) {
                const b = box(c);
                if (b.w < 0.08 * W || b.w > 0.75 * W || b.h < 50) continue;
                if (/^(TR|TD|TH|A|BUTTON|INPUT|LABEL|SPAN)$/i.test(c.tagName)) continue;
                const key = Math.round(b.y / 12);
                rows[key] = (rows[key] || new Set()).add(Math.round(b.x / 12));
            }
            for (const row of Object.values(rows)) most = Math.max(most, row.size);
        }
        return most;
    };
    const bands = document.body ? open(document.body, 0).slice(0, 40).filter(e => e != document.body).map(e => {
        const b = box(e), tag = e.tagName.toLowerCase();
        const side = isSide(e);
        const first = texts.find(t => t.x >= b.x - 1 && t.y >= b.y - 1 && t.y < b.y + b.h && t.x < b.x + b.w);
        const inside = texts.filter(t => t.x >= b.x - 1 && t.y >= b.y - 1 && t.y < b.y + b.h && t.x < b.x + b.w);
        const kind = side ? "sidebar" : tag == "footer" ? "footer" : isNav(e) ? "navigation bar" :
            tag == "header" ? "header" : "section";
        return {kind, ...b, side: side ? (b.x < W / 2 ? "left" : "right") : null,
                background: background(e) || behind(e), columns: columns(e),
                text: first ? first.text.slice(0, 40) : "", place: first ? place(first) : null,
                color: first ? first.color : null, size: first ? first.size : 0,
                letters: inside.reduce((n, t) => n + t.long, 0), pictures: e.querySelectorAll("img").length};
    }) : [];

    const isPicture = e => /^(IMG|PICTURE)$/i.test(e.tagName) && !/^PICTURE$/i.test(e.parentElement.tagName);
    const pictures = some(all.filter(isPicture), 60)
        .map(e => ({...box(e), round: parseFloat(style(e).borderTopLeftRadius) >= 24}));
    const isButton = e => /^BUTTON$/i.test(e.tagName) || /^(submit|button)$/i.test(e.type || "") ||
        (/^A$/i.test(e.tagName) && background(e) && parseFloat(style(e).paddingLeft) >= 8 && box(e).h < 90);
    const buttons = some(all.filter(isButton), 60).map(e => ({
        ...box(e), background: background(e), color: rgb(style(e).color),
        text: words(e.innerText || e.value || "").slice(0, 30),
        round: parseFloat(style(e).borderTopLeftRadius) >= 12}));
    const isField = e =>
        /^(INPUT|SELECT|TEXTAREA)$/i.test(e.tagName) && !/^(submit|button|hidden|image|reset)$/i.test(e.type);
    const fields = some(all.filter(isField), 60).map(e => box(e));
    const links = all.filter(e => /^A$/i.test(e.tagName) && !isButton(e));
    const tables = some(all.filter(e => /^TABLE$/i.test(e.tagName)), 20).map(e => ({rows: e.rows.length, ...box(e)}));
    const font = plain || headline;
    const serif = new RegExp(
        "^[\"']?(ui-serif|serif|georgia|times|liberation serif|cambria|garamond|palatino|merriweather|playfair)", "i");
    return {width: W, height: H, background: page, bands, pictures, buttons, fields, tables, links: links.length,
            nav: links.filter(e => e.closest("nav, header")).length, letters: texts.reduce((n, t) => n + t.long, 0),
            serif: font ? serif.test(font.family) : null,
            headline: headline && {...headline, place: place(headline)},
            text: plain && {color: plain.color, size: plain.size}};
}"""
